//! The object's programs: each is loaded when it is first wanted, and taken over by those who come after.
//!
//! Nearly all the time that a start takes is the kernel's verifier. So nothing is loaded that no device of the
//! node gets, and what passed the verifier once is kept by a pin for the next start, beside the maps:
//!
//! ```text
//! <pin root>/<instance>/programs/from_workload-0123456789abcdef     program, hash of its object
//! ```
//!
//! A pinned program is used only if it came from this object and works on the maps in use.

use std::{
    collections::BTreeMap,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    num::NonZero,
    os::fd::AsFd,
    panic::resume_unwind,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf,
    maps::MapInfo,
    programs::{
        CgroupSockAddr, CgroupSockAddrAttachType, Program, ProgramError, ProgramFd, ProgramType, SchedClassifier, Xdp,
    },
};
use aya_obj::programs::XdpAttachType;
use cirri_abi::map;

use crate::{
    error::{LoadError, VerifierLog, telling_lines},
    pins::at,
    sys,
    tables::Tables,
    trial, warnings,
};

/// The programs of one instance.
pub(crate) struct Programs {
    ebpf: Ebpf,
    /// Where they are pinned.
    dir: PathBuf,
    /// Numbers of the maps in use.
    maps: BTreeMap<u32, &'static str>,
    /// The hash of the object.
    object: String,
    warnings: Vec<String>,
}

impl Programs {
    /// Those of an object whose maps are made, none of them loaded.
    pub fn new(ebpf: Ebpf, object: &[u8], dir: PathBuf, tables: &Tables, warnings: Vec<String>) -> Programs {
        let mut hasher = DefaultHasher::new();
        object.hash(&mut hasher);
        Programs { ebpf, dir, maps: tables.ids(), object: format!("{:016x}", hasher.finish()), warnings }
    }

    /// Loads those that are not loaded yet, several at once.
    pub fn load(&mut self, names: &[&str]) -> Result<(), LoadError> {
        let mut new = Vec::new();
        for name in names {
            if self.get(name)?.fd().is_err() && !self.take_over(name)? {
                new.push(*name);
            }
        }
        verify(&mut self.ebpf, &new, &mut self.warnings)?;
        new.into_iter().filter(|name| !trial::is_ours(name)).try_for_each(|name| self.keep(name))
    }

    /// Every name, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.ebpf.programs().map(|(name, _)| name.to_owned()).collect();
        names.sort();
        names
    }

    /// What aya warned about so far.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The object, for its maps.
    pub fn object_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Removes pins of other objects' programs, which nothing starts with any more.
    pub fn retire_others(&self) -> Result<(), LoadError> {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if !path.to_string_lossy().ends_with(&self.object) {
                fs::remove_file(&path).map_err(at(&path, "unpin"))?;
            }
        }
        Ok(())
    }

    /// Those that are loaded, each with the pin that the next start finds it by.
    pub fn kept(&self) -> impl Iterator<Item = (PathBuf, &ProgramFd)> {
        let loaded = self.ebpf.programs().filter(|(name, _)| !trial::is_ours(name));
        loaded.filter_map(|(name, program)| Some((self.pin_of(name), program.fd().ok()?)))
    }

    /// The kernel's number of a program, if it is loaded.
    pub fn id(&self, name: &str) -> Option<u32> {
        let program = self.ebpf.program(name)?.fd().ok()?;
        sys::program_id(program.as_fd()).ok()
    }

    // === One program, loaded ===

    pub fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier, LoadError> {
        self.loaded(name)?.try_into().map_err(|_| LoadError::Object(format!("{name} is not a classifier")))
    }

    pub fn xdp(&mut self, name: &str) -> Result<&mut Xdp, LoadError> {
        self.loaded(name)?.try_into().map_err(|_| LoadError::Object(format!("{name} is no XDP program")))
    }

    pub fn sock_addr(&mut self, name: &str) -> Result<&mut CgroupSockAddr, LoadError> {
        self.loaded(name)?.try_into().map_err(|_| LoadError::Object(format!("{name} is no program for sockets")))
    }

    /// The descriptor, whatever the program's kind.
    pub fn fd(&mut self, name: &str) -> Result<&ProgramFd, LoadError> {
        self.loaded(name)?.fd().map_err(in_program(name))
    }

    pub fn loaded(&mut self, name: &str) -> Result<&mut Program, LoadError> {
        self.load(&[name])?;
        self.get(name)
    }

    fn get(&mut self, name: &str) -> Result<&mut Program, LoadError> {
        self.ebpf.program_mut(name).ok_or_else(|| LoadError::Object(format!("there is no program {name}")))
    }

    // === Pins ===

    fn pin_of(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}-{}", self.object))
    }

    /// Takes the program that an earlier run kept; whether there was one that can be used.
    fn take_over(&mut self, name: &str) -> Result<bool, LoadError> {
        let pin = self.pin_of(name);
        if !pin.exists() {
            return Ok(false);
        }
        let kept = match self.get(name)? {
            Program::SchedClassifier(_) => SchedClassifier::from_pin(&pin).map(Program::SchedClassifier),
            Program::Xdp(_) => Xdp::from_pin(&pin, XdpAttachType::Interface).map(Program::Xdp),
            Program::CgroupSockAddr(_) => match hook_of(name) {
                Some(hook) => CgroupSockAddr::from_pin(&pin, hook).map(Program::CgroupSockAddr),
                None => return Ok(false),
            },
            _ => return Ok(false),
        };
        // Whatever is wrong with it: the object has the program too.
        let Ok(kept) = kept else { return Ok(false) };
        if !self.works_here(name, &kept).unwrap_or(false) {
            return Ok(false);
        }
        *self.get(name)? = kept;
        Ok(true)
    }

    /// Whether a program has its name and kind, and of the maps of the ABI only those in use.
    fn works_here(&mut self, name: &str, kept: &Program) -> Result<bool, ProgramError> {
        let info = kept.info()?;
        let named = info.name_as_str().is_some_and(|is| !is.is_empty() && name.starts_with(is));
        let kind = info.program_type();
        let of_kind = match self.ebpf.program(name) {
            Some(Program::SchedClassifier(_)) => kind == ProgramType::SchedClassifier.into(),
            Some(Program::Xdp(_)) => kind == ProgramType::Xdp.into(),
            Some(Program::CgroupSockAddr(_)) => kind == ProgramType::CgroupSockAddr.into(),
            _ => false,
        };
        let Some(maps) = info.map_ids()? else { return Ok(false) };
        let strange = |id: &&u32| !self.maps.contains_key(id);
        let foreign = maps.iter().filter(strange).any(|id| {
            let name = MapInfo::from_id(*id).ok().and_then(|map| map.name_as_str().map(str::to_owned));
            name.is_none_or(|name| map::ALL.iter().any(|map| map.name.starts_with(&name)))
        });
        Ok(named && of_kind && !foreign)
    }

    fn keep(&mut self, name: &str) -> Result<(), LoadError> {
        let pin = self.pin_of(name);
        fs::create_dir_all(&self.dir).map_err(at(&self.dir, "create"))?;
        match fs::remove_file(&pin) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&pin, "unpin")(error)),
            _ => {}
        }
        self.get(name)?.pin(&pin).map_err(|error| LoadError::Object(format!("{}: {error}", pin.display())))
    }
}

/// The hook of a program on sockets.
fn hook_of(name: &str) -> Option<CgroupSockAddrAttachType> {
    Some(match name {
        "connect4" => CgroupSockAddrAttachType::Connect4,
        "connect6" => CgroupSockAddrAttachType::Connect6,
        "sendmsg4" => CgroupSockAddrAttachType::UDPSendMsg4,
        "sendmsg6" => CgroupSockAddrAttachType::UDPSendMsg6,
        "recvmsg4" => CgroupSockAddrAttachType::UDPRecvMsg4,
        "recvmsg6" => CgroupSockAddrAttachType::UDPRecvMsg6,
        "getpeername4" => CgroupSockAddrAttachType::GetPeerName4,
        "getpeername6" => CgroupSockAddrAttachType::GetPeerName6,
        "bind4" => CgroupSockAddrAttachType::Bind4,
        "bind6" => CgroupSockAddrAttachType::Bind6,
        _ => return None,
    })
}

/// Loads programs into the kernel, several at once: the verifier takes a second for a large one.
fn verify(ebpf: &mut Ebpf, names: &[&str], warnings: &mut Vec<String>) -> Result<(), LoadError> {
    if names.is_empty() {
        return Ok(());
    }
    let workers = thread::available_parallelism().map_or(1, NonZero::get).min(names.len());
    let queue = Mutex::new(ebpf.programs_mut().filter(|(name, _)| names.contains(name)));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        let load = |(name, program)| (name, warnings::collect(|| load_program(program)));
        std::iter::from_fn(next).map(load).collect::<Vec<_>>()
    };
    let loaded = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let done = |worker: thread::ScopedJoinHandle<'_, _>| worker.join().unwrap_or_else(|panic| resume_unwind(panic));
        workers.into_iter().flat_map(done).collect::<Vec<_>>()
    });
    let mut first = Ok(());
    for (name, (loaded, more)) in loaded {
        warnings.extend(more);
        let failed = match loaded {
            Some(Ok(())) => continue,
            Some(Err(error)) => rejected(name, error, warnings),
            None => LoadError::Object(format!("{name} is of a kind that nothing is made of")),
        };
        first = first.and(Err(failed));
    }
    first
}

/// `None`: nothing is made of such programs.
fn load_program(program: &mut Program) -> Option<Result<(), ProgramError>> {
    match program {
        Program::SchedClassifier(program) => Some(program.load()),
        Program::Xdp(program) => Some(program.load()),
        Program::CgroupSockAddr(program) => Some(program.load()),
        _ => None,
    }
}

fn rejected(program: &str, error: ProgramError, warnings: &[String]) -> LoadError {
    if let ProgramError::LoadError { verifier_log, .. } = &error {
        let log = verifier_log.to_string();
        if !log.trim().is_empty() {
            let telling = telling_lines(&log);
            return LoadError::Verifier {
                program: program.into(),
                telling,
                log: VerifierLog(log),
                warnings: warnings.to_vec(),
            };
        }
    }
    in_program(program)(error)
}

pub(crate) fn in_program(program: &str) -> impl FnOnce(ProgramError) -> LoadError {
    let program = program.to_owned();
    move |error| LoadError::Program { program, error: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_on_sockets_has_its_hook() {
        assert!(crate::socket_hooks::PROGRAMS.iter().all(|name| hook_of(name).is_some()));
        assert!(hook_of("from_workload").is_none());
    }
}
