//! What was changed, by whom, and what it was before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use cirri_loader::net::Address;
use serde::{Deserialize, Serialize};

use super::ports::Ports;
use crate::config::PortRange;

/// Everything that was changed in one network namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// The boot that it was changed in.
    pub boot: String,
    /// Settings by their names below `/proc/sys/net`.
    pub settings: BTreeMap<String, Changed>,
    /// Reserved ports.
    pub ports: Reserved,
    /// Addresses.
    pub addresses: Vec<Added>,
    /// What there can be one owner of.
    pub claims: BTreeMap<String, String>,
    /// Routes of others that ours took the place of, by network.
    pub routes: BTreeMap<String, Replaced>,
    /// Directories that were made, and who needs them.
    pub directories: BTreeMap<PathBuf, BTreeSet<String>>,
}

/// A route of somebody else that was replaced.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Replaced {
    /// As the kernel writes it.
    pub message: Vec<u8>,
    /// Whose route took its place.
    pub owner: String,
}

/// A setting that was changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Changed {
    /// What it was.
    pub before: String,
    /// What it became.
    pub set: String,
    /// Who needs it so.
    pub owners: BTreeSet<String>,
    /// The number of the device that it is of.
    pub device: Option<u32>,
    /// Settings that the kernel changed with it, as they were.
    pub follow: BTreeMap<String, String>,
}

/// Reserved ports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reserved {
    /// What was reserved before the first owner came.
    pub before: String,
    /// Each owner's range.
    pub owners: BTreeMap<String, PortRange>,
}

/// An address that was added.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Added {
    /// The address.
    pub ip: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// The number of its device.
    pub device: u32,
    /// Whether it was there before.
    pub before: bool,
    /// Who needs it.
    pub owners: BTreeSet<String>,
}

/// What nobody needs any more.
#[derive(Debug, Default)]
pub struct Left {
    /// Settings.
    pub settings: Vec<(String, Changed)>,
    /// Ports that are not to be reserved any more.
    pub ports: Option<Ports>,
    /// Addresses: with prefix and device.
    pub addresses: Vec<(IpAddr, u8, u32)>,
}

impl Changed {
    /// It was this, and becomes that.
    pub fn new(before: String, set: &str, device: Option<u32>, follow: BTreeMap<String, String>) -> Changed {
        Changed { before, set: set.to_owned(), owners: BTreeSet::new(), device, follow }
    }
}

impl Record {
    /// An owner needs a setting so. What it was before the first owner is what counts; a device that was made anew
    /// begins anew.
    pub fn take(&mut self, owner: &str, name: &str, changed: Changed) {
        let known = self.settings.entry(name.to_owned()).or_insert_with(|| changed.clone());
        if known.device != changed.device {
            let owners = std::mem::take(&mut known.owners);
            *known = Changed { owners, ..changed.clone() };
        }
        known.set = changed.set;
        known.owners.insert(owner.to_owned());
    }

    /// An owner needs these ports; `now` is what is reserved. Answers what is to be reserved.
    pub fn reserve(&mut self, owner: &str, range: PortRange, now: &str) -> Ports {
        if self.ports.owners.is_empty() {
            self.ports.before = now.to_owned();
        }
        let before = self.ports.owners.insert(owner.to_owned(), range).filter(|before| *before != range);
        let gone = before.map_or_else(|| Ports::parse(""), |before| Ports::parse("").with(before));
        Ports::parse(now).without(&gone.without(&self.needed_ports())).with(range)
    }

    /// Ports that somebody needs reserved.
    fn needed_ports(&self) -> Ports {
        self.ports.owners.values().fold(Ports::parse(&self.ports.before), |all, range| all.with(*range))
    }

    /// An owner needs an address, which is there already or not.
    pub fn add_address(&mut self, owner: &str, address: &Address, there: bool) {
        let Address { ip, prefix, device } = *address;
        let same = |added: &&mut Added| (added.ip, added.prefix, added.device) == (ip, prefix, device);
        match self.addresses.iter_mut().find(same) {
            Some(added) => drop(added.owners.insert(owner.to_owned())),
            None => {
                let owners = BTreeSet::from([owner.to_owned()]);
                self.addresses.push(Added { ip, prefix, device, before: there, owners });
            }
        }
    }

    /// An owner needs a directory; `is_there` tells of the directories that it lies in.
    pub fn need_directory(&mut self, owner: &str, directory: &Path, is_there: impl Fn(&Path) -> bool) {
        for one in directory.ancestors() {
            if self.directories.contains_key(one) || !is_there(one) {
                self.directories.entry(one.to_owned()).or_default().insert(owner.to_owned());
            }
        }
    }

    /// An owner does not need such any more. Answers those that nobody needs, what lies in another before that.
    pub fn leave_directories(&mut self, owner: &str, is_left: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
        let mut left = Vec::new();
        self.directories.retain(|directory, owners| {
            let last = is_left(directory) && owners.remove(owner) && owners.is_empty();
            if last {
                left.push(directory.clone());
            }
            !last
        });
        left.reverse();
        left
    }

    /// An owner leaves all but directories. Answers what is to be put back, because he was the last.
    pub fn leave(&mut self, owner: &str) -> Left {
        let mut left = Left::default();
        self.claims.retain(|_, by| by != owner);
        self.routes.retain(|_, replaced| replaced.owner != owner);
        left.settings = self.leave_settings(owner, |_| true);
        if let Some(range) = self.ports.owners.remove(owner) {
            left.ports = Some(Ports::parse("").with(range).without(&self.needed_ports()));
            if self.ports.owners.is_empty() {
                self.ports = Reserved::default();
            }
        }
        self.addresses.retain_mut(|added| {
            let last = added.owners.remove(owner) && added.owners.is_empty();
            if last && !added.before {
                left.addresses.push((added.ip, added.prefix, added.device));
            }
            !last
        });
        left
    }

    /// An owner leaves the settings with such names. Answers those that are to be put back.
    pub fn leave_settings(&mut self, owner: &str, is_left: impl Fn(&str) -> bool) -> Vec<(String, Changed)> {
        let mut left = Vec::new();
        self.settings.retain(|name, changed| {
            let last = is_left(name) && changed.owners.remove(owner) && changed.owners.is_empty();
            if last {
                left.push((name.clone(), changed.clone()));
            }
            !last
        });
        left
    }

    /// An owner's part of it.
    pub fn of(&self, owner: &str) -> Record {
        let only = BTreeSet::from([owner.to_owned()]);
        let settings = self.settings.iter().filter(|(_, changed)| changed.owners.contains(owner));
        let settings = settings.map(|(name, it)| (name.clone(), Changed { owners: only.clone(), ..it.clone() }));
        let range = self.ports.owners.get_key_value(owner).map(|(owner, range)| (owner.clone(), *range));
        let addresses = self.addresses.iter().filter(|added| added.owners.contains(owner));
        let claims = self.claims.iter().filter(|(_, by)| *by == owner);
        let routes = self.routes.iter().filter(|(_, replaced)| replaced.owner == owner);
        let directories = self.directories.iter().filter(|(_, owners)| owners.contains(owner));
        Record {
            boot: self.boot.clone(),
            settings: settings.collect(),
            ports: Reserved { before: self.ports.before.clone(), owners: range.into_iter().collect() },
            addresses: addresses.map(|it| Added { owners: only.clone(), ..it.clone() }).collect(),
            claims: claims.map(|(what, by)| (what.clone(), by.clone())).collect(),
            routes: routes.map(|(network, replaced)| (network.clone(), replaced.clone())).collect(),
            directories: directories.map(|(directory, _)| (directory.clone(), only.clone())).collect(),
        }
    }

    /// Adds an owner's part where it is missing; whether it was. What others say of the same is left as they say it.
    pub fn add(&mut self, part: &Record) -> bool {
        let before = self.clone();
        for (name, changed) in &part.settings {
            let known = self.settings.entry(name.clone()).or_insert_with(|| changed.clone());
            known.owners.extend(changed.owners.iter().cloned());
        }
        if !part.ports.owners.is_empty() {
            if self.ports.owners.is_empty() {
                self.ports.before.clone_from(&part.ports.before);
            }
            self.ports.owners.extend(part.ports.owners.clone());
        }
        for added in &part.addresses {
            let same = |it: &&mut Added| (it.ip, it.prefix, it.device) == (added.ip, added.prefix, added.device);
            match self.addresses.iter_mut().find(same) {
                Some(known) => known.owners.extend(added.owners.iter().cloned()),
                None => self.addresses.push(added.clone()),
            }
        }
        for (what, by) in &part.claims {
            self.claims.entry(what.clone()).or_insert_with(|| by.clone());
        }
        for (network, replaced) in &part.routes {
            self.routes.entry(network.clone()).or_insert_with(|| replaced.clone());
        }
        for (directory, owners) in &part.directories {
            self.directories.entry(directory.clone()).or_default().extend(owners.iter().cloned());
        }
        *self != before
    }

    /// Whether an owner has anything but directories.
    pub fn has(&self, owner: &str) -> bool {
        Record { directories: BTreeMap::new(), ..self.of(owner) }.owners().contains(owner)
    }

    /// Everybody.
    pub fn owners(&self) -> BTreeSet<String> {
        let settings = self.settings.values().flat_map(|changed| &changed.owners);
        let addresses = self.addresses.iter().flat_map(|added| &added.owners);
        let directories = self.directories.values().flatten();
        let routes = self.routes.values().map(|replaced| &replaced.owner);
        let taken = settings.chain(addresses).chain(routes).chain(directories);
        taken.chain(self.ports.owners.keys()).chain(self.claims.values()).cloned().collect()
    }

    /// Whether nobody has anything.
    pub fn is_empty(&self) -> bool {
        self.owners().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    fn changed(before: &str, device: Option<u32>) -> Changed {
        Changed::new(before.to_owned(), "1", device, BTreeMap::new())
    }

    #[test]
    fn the_last_of_two_owners_puts_back_what_was_before_the_first() {
        let mut record = Record::default();
        record.take("a", "ipv4/ip_forward", changed("0", None));
        record.take("b", "ipv4/ip_forward", changed("1", None));
        record.take("a", "ipv4/ip_forward", changed("1", None));
        assert!(record.leave("a").settings.is_empty() && record.has("b"));
        let left = record.leave("b").settings;
        assert_eq!((left[0].0.as_str(), left[0].1.before.as_str()), ("ipv4/ip_forward", "0"));
        assert!(record.is_empty() && record.leave("b").settings.is_empty(), "twice");
    }

    #[test]
    fn a_device_that_was_made_anew_has_another_before() {
        let mut record = Record::default();
        record.take("a", "ipv4/conf/eth0/rp_filter", changed("2", Some(4)));
        record.take("a", "ipv4/conf/eth0/rp_filter", changed("0", Some(9)));
        let left = record.leave("a").settings;
        assert_eq!((left[0].1.before.as_str(), left[0].1.device), ("0", Some(9)));
    }

    #[test]
    fn ports_are_given_back_but_for_those_that_others_need_or_had_before() {
        let mut record = Record::default();
        assert_eq!(record.reserve("a", range(512, 1023), "1030,8080").to_string(), "512-1023,1030,8080");
        let moved = record.reserve("a", range(1024, 2047), "512-1023,1030,8080");
        assert_eq!(moved.to_string(), "1024-2047,8080", "what an owner had before is given back");
        record.reserve("b", range(1536, 2047), "1024-2047,8080");
        let ports = record.leave("a").ports.unwrap();
        assert_eq!(ports.to_string(), "1024-1029,1031-1535");
        assert_eq!(record.leave("b").ports.unwrap().to_string(), "1536-2047");
        assert!(record.is_empty() && record.leave("b").ports.is_none());
    }

    #[test]
    fn what_a_record_lost_is_written_again_by_each_owner_and_puts_back_the_same() {
        let mut record = Record::default();
        record.take("a", "ipv4/ip_forward", changed("0", None));
        record.take("b", "ipv4/ip_forward", changed("1", None));
        record.take("b", "ipv4/conf/eth0/rp_filter", changed("2", Some(4)));
        record.reserve("a", range(512, 1023), "8080");
        record.reserve("b", range(512, 1023), "8080,512-1023");
        record.add_address("a", &Address { ip: [192, 0, 2, 1].into(), prefix: 32, device: 1 }, false);
        record.claims.insert("node".to_owned(), "a".to_owned());
        record.routes.insert("10.0.0.0/8".to_owned(), Replaced { message: vec![2], owner: "b".to_owned() });
        let (a, b) = (record.of("a"), record.of("b"));
        assert!(!record.clone().add(&a) && !record.clone().add(&b), "nothing is missing");
        let mut again = Record::default();
        assert!(again.add(&b) && again.add(&a) && !again.add(&a));
        assert_eq!(again, record);
        let mut stolen = Record::default();
        stolen.claims.insert("node".to_owned(), "c".to_owned());
        stolen.add(&a);
        assert_eq!(stolen.claims["node"], "c", "nobody takes what another claimed meanwhile");
    }

    #[test]
    fn directories_that_were_made_go_with_the_last_who_needs_them_and_no_others() {
        let mut record = Record::default();
        let there = |path: &Path| path == Path::new("/") || path == Path::new("/run");
        record.need_directory("a", Path::new("/run/x/y"), there);
        assert!(!record.has("a") && !record.is_empty() && record.of("a") == record);
        // Those are there by now.
        record.need_directory("a", Path::new("/run/x/y"), |_| true);
        record.need_directory("b", Path::new("/run/x/z"), |path| path != Path::new("/run/x/z"));
        assert_eq!(record.leave_directories("a", |_| true), [Path::new("/run/x/y")]);
        assert_eq!(record.leave_directories("b", |_| true), [Path::new("/run/x/z"), Path::new("/run/x")]);
        assert!(record.is_empty());
    }

    #[test]
    fn an_address_that_was_there_stays() {
        let mut record = Record::default();
        let address = |last| Address { ip: [192, 0, 2, last].into(), prefix: 32, device: 1 };
        record.add_address("a", &address(1), true);
        record.add_address("a", &address(2), false);
        record.add_address("b", &address(2), true);
        assert!(record.leave("a").addresses.is_empty());
        assert_eq!(record.leave("b").addresses, [([192, 0, 2, 2].into(), 32, 1)]);
    }
}
