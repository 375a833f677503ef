//! What Cirri changes of a machine's network beside its own devices and routes: settings of the kernel, addresses
//! of its devices, reserved ports, routes of others in the place of its own. Written down before it is changed, and put
//! back when the last who needs it leaves.
//!
//! There is one file for each network namespace, [`DIRECTORY`]`/<cookie>.json`, whoever changes something there:
//! an agent, a load balancer, a host behind one. Each is an owner with a name. Taking something twice is
//! harmless; what somebody else changed since is left to him.

mod claims;
mod made;
mod ports;
mod record;
mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cirri_loader::net::{Address, Net, NetError, OpenSettings};
use rustix::fs::{FlockOperation, flock};

pub use self::made::Made;
use self::ports::Ports;
use self::record::{Added, Changed, Record};
use crate::config::PortRange;

/// Where the files are. What stands in them is void after a reboot.
pub const DIRECTORY: &str = "/run/cirri-settings";
/// Ports that the kernel gives to no socket by itself.
const RESERVED: &str = "ipv4/ip_local_reserved_ports";

/// One owner's part of the settings of a network namespace.
#[derive(Debug)]
pub struct Settings {
    net: Net,
    directory: PathBuf,
    file: PathBuf,
    owner: String,
    /// What this owner set, to compare with.
    wanted: BTreeMap<String, String>,
    /// What it compares.
    open: OpenSettings,
    ports: Option<PortRange>,
    /// This owner's part of the record.
    kept: Record,
    /// The record's file as it was last seen to have that.
    seen: Option<(u64, i64, i64)>,
}

/// Settings could not be recorded, changed or put back.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The kernel.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The record.
    #[error("{path}: {error}; nothing is changed that cannot be recorded")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Somebody else has what there can be one of.
    #[error("{by} has this network namespace: stop it and remove what it made (`--cleanup`) first")]
    Claimed {
        /// Who.
        by: String,
    },
}

/// A setting that has another value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drifted {
    /// Below `/proc/sys/net`.
    pub name: String,
    /// What it is; empty if it cannot be read.
    pub found: String,
    /// What it was set to.
    pub wanted: String,
}

impl Settings {
    /// Those of an owner in this namespace.
    ///
    /// # Errors
    /// The kernel does not tell which namespace it is.
    pub fn of(net: &Net, owner: String) -> Result<Settings, SettingsError> {
        Settings::within(Path::new(DIRECTORY), net, owner)
    }

    fn within(directory: &Path, net: &Net, owner: String) -> Result<Settings, SettingsError> {
        let file = directory.join(format!("{:x}.json", net.namespace().cookie()?));
        let directory = directory.to_owned();
        let (wanted, open) = (BTreeMap::new(), OpenSettings::default());
        let (kept, seen) = (Record::default(), None);
        Ok(Settings { net: net.clone(), directory, file, owner, wanted, open, ports: None, kept, seen })
    }

    /// Whether this owner has anything here.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn is_known(&self) -> Result<bool, SettingsError> {
        Ok(self.read()?.has(&self.owner))
    }

    /// Everybody who has something here.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn owners(&self) -> Result<BTreeSet<String>, SettingsError> {
        Ok(self.read()?.owners())
    }

    /// What is not as the record says that this owner made it, whichever process that was.
    ///
    /// # Errors
    /// The record cannot be read, or the kernel does not tell.
    pub async fn differing(&self) -> Result<Vec<Drifted>, SettingsError> {
        let part = self.read()?.of(&self.owner);
        let mut differing = Vec::new();
        let mut note = |name: String, found: &str, wanted: String| {
            differing.push(Drifted { name, found: found.to_owned(), wanted });
        };
        for (name, changed) in part.settings {
            let now = self.net.sysctls([name.as_str()])?.pop().flatten().unwrap_or_default();
            if now != changed.set {
                note(name, &now, changed.set);
            } else if self.name_now(&name, changed.device)?.is_none_or(|now| now != name) {
                note(name, "of a device that was made anew", "of the one that was set up".to_owned());
            }
        }
        let there = self.net.addresses().await?;
        for Added { ip, prefix, device, .. } in part.addresses {
            if !there.contains(&Address { ip, prefix, device }) {
                let device = self.net.device_name(device)?.unwrap_or_else(|| format!("device {device}"));
                note(format!("{ip}/{prefix}"), "gone", format!("on {device}"));
            }
        }
        Ok(differing)
    }

    /// Gives a setting below `/proc/sys/net` this value.
    ///
    /// # Errors
    /// It cannot be recorded, or not be written.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), SettingsError> {
        // Somebody who leaves puts back what he found: it is not looked at before he has, nor changed while he does.
        let lock = self.lock()?;
        let now = self.net.sysctl(name)?;
        let device = self.device_of(name)?;
        let follow = if now == value { BTreeMap::new() } else { self.followers(name)? };
        let owner = self.owner.clone();
        self.change_locked(&lock, |record| {
            record.take(&owner, name, Changed::new(now, value, device, follow));
            Ok(())
        })?;
        self.net.set_sysctl(name, value)?;
        self.wanted.insert(name.to_owned(), value.to_owned());
        Ok(())
    }

    /// Keeps a range of ports from the sockets of the machine.
    ///
    /// # Errors
    /// It cannot be recorded, or not be written.
    pub fn reserve(&mut self, range: PortRange) -> Result<(), SettingsError> {
        let lock = self.lock()?;
        let now = self.net.sysctl(RESERVED)?;
        let owner = self.owner.clone();
        let mut all = Ports::parse(&now);
        self.change_locked(&lock, |record| {
            all = record.reserve(&owner, range, &now);
            Ok(())
        })?;
        self.ports = Some(range);
        if all == Ports::parse(&now) { Ok(()) } else { Ok(self.net.set_sysctl(RESERVED, &all.to_string())?) }
    }

    /// Gives a device an address.
    ///
    /// # Errors
    /// It cannot be recorded, or not be added.
    pub async fn add_address(&mut self, address: &Address) -> Result<(), SettingsError> {
        let lock = self.lock()?;
        let there = self.net.addresses().await?.contains(address);
        let owner = self.owner.clone();
        self.change_locked(&lock, |record| {
            record.add_address(&owner, address, there);
            Ok(())
        })?;
        Ok(self.net.add_address(address).await?)
    }

    /// What is not as this owner set it.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn drifted(&mut self, more: &[(String, &str)]) -> Result<Vec<Drifted>, SettingsError> {
        let own = self.wanted.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let wanted: Vec<(&str, &str)> = own.chain(more.iter().map(|(name, value)| (name.as_str(), *value))).collect();
        let read = self.open.read(&self.net, wanted.iter().map(|(name, _)| *name).chain([RESERVED]))?;
        let mut drifted = Vec::new();
        for ((name, value), found) in wanted.iter().zip(&read) {
            // A setting that is gone went with its device.
            let Some(found) = found else { continue };
            if found != value {
                let (name, found, wanted) = ((*name).to_owned(), found.clone(), (*value).to_owned());
                drifted.push(Drifted { name, found, wanted });
            }
        }
        if let (Some(range), Some(Some(now))) = (self.ports, read.last())
            && !Ports::parse(now).contains(range)
        {
            let wanted = format!("{} among them", String::from(range));
            drifted.push(Drifted { name: RESERVED.to_owned(), found: now.clone(), wanted });
        }
        Ok(drifted)
    }

    /// Makes a setting right that drifted. One of this owner's is recorded again: its device may have been made anew,
    /// and what was before is another value then.
    ///
    /// # Errors
    /// It cannot be recorded, or not be written.
    pub fn restore(&mut self, drifted: &Drifted) -> Result<(), SettingsError> {
        if let (RESERVED, Some(range)) = (drifted.name.as_str(), self.ports) {
            let _lock = self.lock()?;
            let all = Ports::parse(&self.net.sysctl(RESERVED)?).with(range);
            return Ok(self.net.set_sysctl(RESERVED, &all.to_string())?);
        }
        match self.wanted.contains_key(&drifted.name) {
            true => self.set(&drifted.name, &drifted.wanted),
            false => Ok(self.net.set_sysctl(&drifted.name, &drifted.wanted)?),
        }
    }

    /// This owner will make these directories, and those that they lie in, as far as they are not there. Answers those that
    /// it did not need before.
    ///
    /// # Errors
    /// They cannot be recorded.
    pub fn need_directories(&mut self, directories: &[&Path]) -> Result<BTreeSet<PathBuf>, SettingsError> {
        let owner = self.owner.clone();
        let mut new = BTreeSet::new();
        self.change(|record| {
            let before = record.of(&owner);
            directories.iter().for_each(|directory| record.need_directory(&owner, directory, Path::exists));
            new.extend(record.of(&owner).directories.into_keys());
            new.retain(|directory| !before.directories.contains_key(directory));
            Ok(())
        })?;
        Ok(new)
    }

    /// Removes directories that were made for this owner and that nobody else needs, if nothing is in them: these, or all.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn remove_directories(&mut self, these: Option<&BTreeSet<PathBuf>>) -> Result<(), SettingsError> {
        let mut left = Vec::new();
        let owner = self.owner.clone();
        self.change(|record| {
            left = record.leave_directories(&owner, |directory| these.is_none_or(|these| these.contains(directory)));
            Ok(())
        })?;
        for directory in left {
            // What stays has something of somebody else in it, or is empty and costs nothing.
            let _ = fs::remove_dir(directory);
        }
        Ok(())
    }

    /// This owner leaves the settings of devices that have none of these names, as [`Settings::release`] does all. Answers
    /// what was put back.
    ///
    /// # Errors
    /// What cannot be put back stays recorded.
    pub fn leave_other_devices(&mut self, stay: &[&str]) -> Result<Vec<String>, SettingsError> {
        let is_left = |name: &str| device_in(name).is_some_and(|device| !stay.contains(&device));
        if !self.kept.settings.keys().any(|name| is_left(name)) {
            return Ok(Vec::new());
        }
        let owner = self.owner.clone();
        let _lock = self.lock()?;
        let mut record = self.read()?;
        let left = record.leave_settings(&owner, is_left);
        let done = self.put_all_back(&left, &mut record)?;
        self.write(&record)?;
        self.wanted.retain(|name, _| !is_left(name));
        (self.kept, self.seen) = (record.of(&owner), self.stamp());
        Ok(done)
    }

    /// This owner leaves all but directories: puts back what nobody else needs and nobody changed since. Answers what was
    /// put back.
    ///
    /// # Errors
    /// What cannot be put back stays recorded.
    pub async fn release(&mut self) -> Result<Vec<String>, SettingsError> {
        let _lock = self.lock()?;
        let mut record = self.read()?;
        let left = record.leave(&self.owner);
        let mut done = self.put_all_back(&left.settings, &mut record)?;
        if let Some(ports) = &left.ports {
            let there = Ports::parse(&self.net.sysctl(RESERVED)?);
            let rest = there.without(ports);
            if rest != there {
                // The kernel takes an empty line for none.
                let text = rest.to_string();
                self.net.set_sysctl(RESERVED, if text.is_empty() { "\n" } else { &text })?;
                done.push(format!("{RESERVED}={text}"));
            }
        }
        for (ip, prefix, device) in &left.addresses {
            let address = Address { ip: *ip, prefix: *prefix, device: *device };
            if self.net.delete_address(&address).await? {
                done.push(format!("{ip}/{prefix} of device {device}"));
            }
        }
        self.write(&record)?;
        (self.wanted, self.ports) = (BTreeMap::new(), None);
        (self.kept, self.seen) = (Record::default(), None);
        Ok(done)
    }

    /// Answers those that were written. The record is what others need.
    fn put_all_back(&self, left: &[(String, Changed)], rest: &mut Record) -> Result<Vec<String>, SettingsError> {
        let mut done = Vec::new();
        for (name, changed) in left {
            if let Some(value) = self.put_back(name, changed, rest)? {
                done.push(format!("{name}={value}"));
            }
        }
        Ok(done)
    }

    /// Writes the value from before, if nobody changed it since; the value that was written.
    fn put_back(&self, name: &str, changed: &Changed, rest: &mut Record) -> Result<Option<String>, SettingsError> {
        let Some(name) = self.name_now(name, changed.device)? else { return Ok(None) };
        let now = self.net.sysctls([name.as_str()])?;
        let is_ours = now.first().and_then(Option::as_deref) == Some(changed.set.as_str());
        if !is_ours || changed.set == changed.before {
            return Ok(None);
        }
        // Those of devices that came since are among them.
        let followers = self.followers(&name)?;
        let mut needed = BTreeMap::new();
        for (recorded, known) in rest.settings.iter().filter(|_| !followers.is_empty()) {
            needed.extend(self.name_now(recorded, known.device)?.map(|now| (now, recorded.clone())));
        }
        let mut writes = vec![(name.clone(), changed.before.clone())];
        for (follower, now) in followers {
            let recorded = needed.get(&follower).unwrap_or(&follower);
            let (caused, old) = (caused(&follower, &changed.set), followed(recorded, changed));
            let value = match rest.settings.get_mut(recorded) {
                Some(known) => {
                    // What its owners found was our change, or else what somebody wanted.
                    if known.before == caused {
                        known.before = old;
                    }
                    now
                }
                // Where it still is as our change made it, it becomes what it was; else it stays as somebody wanted it.
                None if now == caused => old,
                None => now,
            };
            writes.push((follower, value));
        }
        let written = write_each(&writes, |name, value| self.net.set_sysctl(name, value))?;
        Ok(written.contains(&name.as_str()).then(|| changed.before.clone()))
    }

    /// The number of the device that a setting is of; `None`: of no single device.
    fn device_of(&self, name: &str) -> Result<Option<u32>, SettingsError> {
        let Some(device) = device_in(name) else { return Ok(None) };
        Ok(Some(self.net.device_number(device)?))
    }

    /// The name of a setting now: its device may have another name. `None`: the device is gone.
    fn name_now(&self, name: &str, device: Option<u32>) -> Result<Option<String>, SettingsError> {
        let (Some(index), Some(old)) = (device, device_in(name)) else { return Ok(Some(name.to_owned())) };
        let now = self.net.device_name(index)?;
        Ok(now.map(|now| name.replacen(&format!("/{old}/"), &format!("/{now}/"), 1)))
    }

    /// What else the kernel changes with a setting, and its values now.
    fn followers(&self, name: &str) -> Result<BTreeMap<String, String>, SettingsError> {
        let names = match name {
            "ipv4/ip_forward" => {
                let mut all = self.net.sysctl_names("ipv4/conf", "forwarding")?;
                all.push("ipv4/conf/all/accept_redirects".to_owned());
                all
            }
            "ipv6/conf/all/forwarding" => self.net.sysctl_names("ipv6/conf", "forwarding")?,
            _ => Vec::new(),
        };
        let names: Vec<String> = names.into_iter().filter(|follower| follower != name).collect();
        let values = self.net.sysctls(names.iter().map(String::as_str))?;
        Ok(names.into_iter().zip(values).filter_map(|(name, value)| Some((name, value?))).collect())
    }

    /// The record's file, if it does not have this owner's part any more.
    ///
    /// # Errors
    /// It cannot be locked.
    pub fn lost_record(&mut self) -> Result<Option<PathBuf>, SettingsError> {
        if self.kept.is_empty() || self.seen.is_some() && self.seen == self.stamp() {
            return Ok(None);
        }
        let _lock = self.lock()?;
        let stamp = self.stamp();
        match self.read() {
            // Somebody else's part is another.
            Ok(record) if !record.clone().add(&self.kept) => {
                // Who left may have told what was before.
                (self.kept, self.seen) = (record.of(&self.owner), stamp);
                Ok(None)
            }
            _ => Ok(Some(self.file.clone())),
        }
    }

    /// Writes this owner's part into the record again.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn record_again(&mut self) -> Result<(), SettingsError> {
        let _lock = self.lock()?;
        // One that cannot be read says nothing to anybody.
        let mut record = self.read().unwrap_or_else(|_| Record { boot: boot(), ..Record::default() });
        record.add(&self.kept);
        self.write(&record)?;
        self.seen = self.stamp();
        Ok(())
    }

    /// What tells the file from one that was written since.
    fn stamp(&self) -> Option<(u64, i64, i64)> {
        fs::metadata(&self.file).ok().map(|it| (it.ino(), it.mtime(), it.mtime_nsec()))
    }

    /// Reads the record, changes it, and writes it, while nobody else does.
    fn change(&mut self, change: impl FnOnce(&mut Record) -> Result<(), SettingsError>) -> Result<(), SettingsError> {
        let lock = self.lock()?;
        self.change_locked(&lock, change)
    }

    /// The same, by who has the lock, and may have it for longer.
    fn change_locked(
        &mut self,
        _lock: &File,
        change: impl FnOnce(&mut Record) -> Result<(), SettingsError>,
    ) -> Result<(), SettingsError> {
        let mut record = self.read()?;
        let before = record.clone();
        change(&mut record)?;
        if record != before {
            self.write(&record)?;
        }
        (self.kept, self.seen) = (record.of(&self.owner), self.stamp());
        Ok(())
    }

    fn read(&self) -> Result<Record, SettingsError> {
        let boot = boot();
        let fresh = Record { boot: boot.clone(), ..Record::default() };
        match fs::read(&self.file) {
            // One of another boot says nothing about this one.
            Ok(text) => match serde_json::from_slice::<Record>(&text) {
                Ok(record) if record.boot == boot => Ok(record),
                Ok(_) => Ok(fresh),
                Err(error) => Err(self.failed(io::Error::other(error))),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(fresh),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn write(&self, record: &Record) -> Result<(), SettingsError> {
        if record.is_empty() {
            crate::files::remove(&self.file).map_err(|error| self.failed(error))?;
            // Not if others have files in it.
            return crate::files::remove_empty(&self.directory).map_err(|error| self.failed(error));
        }
        let text = serde_json::to_vec_pretty(record).map_err(|error| self.failed(error.into()))?;
        crate::files::write_atomic(&self.file, &text).map_err(|error| self.failed(error))
    }

    fn lock(&self) -> Result<File, SettingsError> {
        lock(&self.directory).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: io::Error) -> SettingsError {
        SettingsError::File { path: self.file.clone(), error }
    }
}

/// Removes the records of owners whose names begin so, and whose namespaces are gone with all that was set there.
///
/// # Errors
/// The file system's.
pub fn forget(owners: &str) -> io::Result<()> {
    forget_in(Path::new(DIRECTORY), owners)
}

fn forget_in(directory: &Path, owners: &str) -> io::Result<()> {
    let _lock = lock(directory)?;
    for (path, text) in crate::files::read_all(directory)? {
        let record = serde_json::from_slice::<Record>(&text);
        if record.is_ok_and(|record| record.owners().iter().all(|owner| owner.starts_with(owners))) {
            crate::files::remove(&path)?;
        }
    }
    crate::files::remove_empty(directory)
}

/// Nobody else writes records, or removes their directory, as long as the answer is kept.
fn lock(path: &Path) -> io::Result<File> {
    loop {
        let directory = crate::files::in_made(path, || File::open(path))?;
        flock(&directory, FlockOperation::LockExclusive)?;
        // Somebody may have removed it while we waited.
        let ours = directory.metadata()?.ino();
        if fs::metadata(path).is_ok_and(|now| now.ino() == ours) {
            crate::files::sweep(path, |name| name.ends_with(".json"));
            return Ok(directory);
        }
    }
}

/// Writes settings, one after the other, and answers which: one whose device goes meanwhile goes with it. The kernel
/// has changed others along with the first, so that all of them get their turn, also after one that fails.
fn write_each(
    settings: &[(String, String)],
    write: impl Fn(&str, &str) -> Result<(), NetError>,
) -> Result<Vec<&str>, NetError> {
    let (mut written, mut failed) = (Vec::new(), None);
    for (name, value) in settings {
        match write(name, value) {
            Ok(()) => written.push(name.as_str()),
            Err(NetError::Kernel { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or(Ok(written), Err)
}

/// What a follower becomes when its setting gets this value.
fn caused(follower: &str, value: &str) -> String {
    match follower.ends_with("/accept_redirects") {
        true => if value == "0" { "1" } else { "0" }.to_owned(),
        false => value.to_owned(),
    }
}

/// What a follower was before its setting was changed. One of a device that came since would be as those that come.
fn followed(follower: &str, changed: &Changed) -> String {
    let old = |name: &str| changed.follow.get(name).cloned();
    let family = follower.split_once("/conf/").map_or("", |(family, _)| family);
    old(follower)
        .or_else(|| old(&format!("{family}/conf/default/forwarding")))
        .unwrap_or_else(|| caused(follower, &changed.before))
}

/// What tells this boot from others.
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The device that a setting is of.
fn device_in(name: &str) -> Option<&str> {
    let (_, rest) = name.split_once("/conf/")?;
    let (device, _) = rest.split_once('/')?;
    (device != "all" && device != "default").then_some(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_of_a_device_is_told_from_those_of_all() {
        assert_eq!(device_in("ipv4/conf/eth0/rp_filter"), Some("eth0"));
        assert_eq!(device_in("ipv4/conf/eth0.100/rp_filter"), Some("eth0.100"));
        assert_eq!(device_in("ipv4/conf/all/rp_filter"), None);
        assert_eq!(device_in("ipv4/ip_forward"), None);
    }

    #[test]
    fn a_setting_whose_device_goes_while_settings_are_put_back_keeps_none_of_the_others_from_it() {
        let all = ["ip_forward", "conf/gone/forwarding", "conf/denied/forwarding", "conf/eth0/forwarding"];
        let all = all.map(|name| (name.to_owned(), "0".to_owned()));
        let tried = std::cell::RefCell::new(Vec::new());
        let write = |name: &str, _: &str| {
            tried.borrow_mut().push(name.to_owned());
            let error = match name {
                "conf/gone/forwarding" => io::ErrorKind::NotFound,
                "conf/denied/forwarding" => io::ErrorKind::PermissionDenied,
                _ => return Ok(()),
            };
            let (namespace, object) = (PathBuf::new(), name.to_owned());
            Err(NetError::Kernel { namespace, object, action: "write", error: error.into() })
        };
        assert_eq!(write_each(&all[..2], write).unwrap(), ["ip_forward"], "it went with its device");
        tried.borrow_mut().clear();
        let error = write_each(&all, write).unwrap_err().to_string();
        assert!(error.contains("conf/denied/forwarding"), "{error}");
        assert_eq!(*tried.borrow(), all.each_ref().map(|(name, _)| name.as_str()));
    }

    #[test]
    fn a_directory_of_records_that_cannot_be_made_is_an_error() {
        let above = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("nowhere", above.path().join("link")).unwrap();
        assert!(lock(&above.path().join("link/records")).is_err());
    }

    #[test]
    fn those_that_come_and_go_at_once_do_not_stand_in_each_others_way() {
        let directory = std::env::temp_dir().join(format!("cirri-forget-{}", std::process::id()));
        let live = &|owner: String| {
            let file = directory.join(format!("{owner}.json"));
            let mut record = Record { boot: boot(), ..Record::default() };
            record.need_directory(&owner, Path::new("/gone"), |_| false);
            let text = serde_json::to_vec(&record).unwrap();
            for _ in 0..100 {
                let held = lock(&directory).unwrap();
                crate::files::write_atomic(&file, &text).unwrap();
                drop(held);
                forget_in(&directory, &owner).unwrap();
                assert!(!file.exists());
            }
        };
        std::thread::scope(|scope| {
            for number in 0..4 {
                scope.spawn(move || live(format!("agent {number}")));
            }
        });
        assert!(!directory.exists(), "the last one leaves no directory");
    }

    #[test]
    fn redirects_are_the_other_way_round_than_forwarding() {
        assert_eq!(caused("ipv4/conf/all/accept_redirects", "1"), "0");
        assert_eq!(caused("ipv4/conf/eth0/forwarding", "1"), "1");
    }

    #[test]
    fn a_device_that_came_since_is_as_those_that_come_without_the_change() {
        let follow = [("ipv4/conf/eth0/forwarding", "1"), ("ipv4/conf/default/forwarding", "0")];
        let follow = follow.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let changed = Changed::new("0".to_owned(), "1", None, follow);
        assert_eq!(followed("ipv4/conf/eth0/forwarding", &changed), "1");
        assert_eq!(followed("ipv4/conf/eth9/forwarding", &changed), "0");
        let changed = Changed { follow: BTreeMap::new(), ..changed };
        assert_eq!(followed("ipv4/conf/all/accept_redirects", &changed), "1");
    }
}
