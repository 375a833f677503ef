//! Programs on the sockets of a cgroup, which translate a service's address when a socket is used
//! instead of packet by packet.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use aya::programs::{CgroupAttachMode, links::FdLink};
use rustix::fs::fstatfs;

use crate::{
    attach::{attaching, pinned},
    datapath::Datapath,
    error::LoadError,
    sys,
};

/// The programs, also those of their hooks and pins.
pub(crate) const PROGRAMS: [&str; 10] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "bind4",
    "bind6",
];

/// In the place of a device's number in the names of pins.
pub(crate) const CGROUP: u32 = 0;

impl Datapath {
    /// Puts the programs on the sockets of every process in a cgroup (of version 2) and below it,
    /// replacing those of an earlier run atomically. What was on another cgroup goes.
    ///
    /// Sockets that are connected already stay as they are.
    pub fn attach_sockets(&mut self, cgroup: &Path) -> Result<(), LoadError> {
        let (dir, number) = open_cgroup(cgroup)?;
        let shown = cgroup.display().to_string();
        self.programs.load(&PROGRAMS)?;
        self.before_attaching(CGROUP)?;
        for program in PROGRAMS {
            let pin = self.pins.link(program, CGROUP);
            let there = pinned(&pin)?;
            if let Some((link, _)) = there.as_ref().filter(|(_, info)| info.cgroup() == number) {
                let new = self.programs.fd(program)?;
                sys::update_link(link.as_fd(), new.as_fd()).map_err(attaching(program, &shown))?;
                continue;
            }
            let program_of = self.programs.sock_addr(program)?;
            // The name misleads: a link made with it runs beside others.
            let link = program_of.attach(&dir, CgroupAttachMode::Single).map_err(attaching(program, &shown))?;
            let link = program_of.take_link(link).map_err(attaching(program, &shown))?;
            let link = FdLink::try_from(link).map_err(attaching(program, &shown))?;
            if there.is_some() {
                self.pins.drop_link(&pin)?;
            }
            link.pin(&pin).map_err(attaching(program, &shown))?;
        }
        self.after_attaching(CGROUP)
    }

    /// Takes the programs off the sockets; whether any were there. What sockets were translated for
    /// stays: they go on with the backends that they have.
    pub fn detach_sockets(&mut self) -> Result<bool, LoadError> {
        let mut any = false;
        for program in PROGRAMS {
            let pin = self.pins.link(program, CGROUP);
            if pinned(&pin)?.is_some() {
                self.pins.drop_link(&pin)?;
                any = true;
            }
        }
        Ok(any)
    }
}

/// Where the hierarchy of cgroups of version 2 is mounted: the place to give to
/// [`Datapath::attach_sockets`] for the sockets of all processes.
pub fn cgroup_root() -> Result<PathBuf, LoadError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    cgroup_root_of(&mounts).ok_or_else(|| LoadError::Missing {
        what: "no cgroup hierarchy of version 2 is mounted".into(),
        hint: "run `mount -t cgroup2 none /sys/fs/cgroup/unified`, or name a mount in services.socket.cgroup",
    })
}

fn cgroup_root_of(mounts: &str) -> Option<PathBuf> {
    let roots = mounts.lines().filter_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (root, place) = (fields.next()?, fields.next()?);
        (kind.split(' ').next()? == "cgroup2").then(|| (root, unescaped(place)))
    });
    // From inside a cgroup namespace, a mount from outside begins above that namespace's root.
    let above = |root: &str| root.split('/').filter(|part| *part == "..").count();
    let below = |root: &str| root.split('/').filter(|part| !part.is_empty() && *part != "..").count();
    let (_, place) = roots.min_by_key(|(root, _)| (std::cmp::Reverse(above(root)), below(root)))?;
    Some(place)
}

/// A path of `/proc/self/mountinfo`: blanks and the like are octal numbers there.
fn unescaped(path: &str) -> PathBuf {
    let mut parts = path.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                plain.push(code.into());
                plain.push_str(part.get(3..).unwrap_or_default());
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain.into()
}

/// The directory and the cgroup's number.
fn open_cgroup(path: &Path) -> Result<(File, u64), LoadError> {
    const CGROUP2: u32 = 0x6367_7270;
    let failed = |error: io::Error| LoadError::Cgroup { path: path.into(), problem: error.to_string() };
    let dir = File::open(path).map_err(failed)?;
    let kind = fstatfs(&dir).map_err(|error| failed(error.into()))?.f_type as u32;
    if kind != CGROUP2 {
        return Err(LoadError::Cgroup { path: path.into(), problem: "it is no cgroup of version 2".into() });
    }
    let number = dir.metadata().map_err(failed)?.ino();
    Ok((dir, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 master:2 - cgroup2 cgroup2 rw
";

    #[test]
    fn the_mount_is_found_beside_those_of_version_1() {
        assert_eq!(cgroup_root_of(HYBRID), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup_root_of("23 1 0:28 / / rw - ext4 /dev/vda rw\n"), None);
    }

    #[test]
    fn a_mount_from_outside_is_preferred_to_the_containers_own() {
        let mounts = "\
30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw
44 23 0:26 /../../.. /run/cirri/cgroup\\040v2 rw - cgroup2 cgroup rw
";
        assert_eq!(cgroup_root_of(mounts), Some("/run/cirri/cgroup v2".into()));
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_named() {
        for path in ["/tmp", "/sys/fs/cgroup/no-such-group"] {
            let error = open_cgroup(Path::new(path)).expect_err("must be refused").to_string();
            assert!(error.contains(path) && error.contains("services.socket.cgroup"), "{error}");
        }
    }
}
