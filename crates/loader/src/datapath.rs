//! Loading, upgrading, and what is loaded.

use std::{
    collections::BTreeMap,
    fs::File,
    num::NonZero,
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{CgroupSockAddr, Program, ProgramError, ProgramFd, SchedClassifier, Xdp},
};
use cirri_abi::map;

use crate::{
    attach::{self, Attachment},
    audit::Held,
    edge,
    error::{LoadError, MapError, VerifierLog, telling_lines},
    events::Events,
    features::{self, Hooking},
    pins::{Found, Pins, open_set},
    sizes::sizes,
    socket_hooks,
    tables::Tables,
    trial::{self, Trial},
    warnings,
};

/// The packet programs of one node, loaded and attached.
///
/// Maps and attachments belong to the kernel: dropping this, or the death of the process, leaves
/// both in place, and the next [`Datapath::load`] of the same instance finds them. The order at
/// every start is: load, fill the tables, attach every device, then [`Datapath::retire`].
///
/// One agent at a time may use an instance. Devices are looked up in the network namespace of the
/// calling thread.
pub struct Datapath {
    pub(crate) ebpf: Ebpf,
    pub(crate) pins: Pins,
    pub(crate) hooking: Hooking,
    /// Links that outlive their pins.
    pub(crate) held: Held,
    tables: Tables,
    /// Whether the maps, and with them all flows, came from an earlier run.
    resumed: bool,
    warnings: Vec<String>,
}

/// Where and how large.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// A directory on a BPF file system.
    pub pin_root: PathBuf,
    /// Tells agents on one machine apart: letters, digits, `-`, `_`.
    pub instance: String,
    /// Entries of maps that shall not have the number in [`cirri_abi::map`], by name (`FLOWS4`).
    pub sizes: BTreeMap<String, u32>,
    /// How to attach, if the best way that the kernel has shall not be used.
    pub hooking: Option<Hooking>,
}

/// One loaded program, as `cargo xtask verify` and `cirri status` show it.
#[derive(Clone, Debug)]
pub struct ProgramStatus {
    /// Name in the object.
    pub name: String,
    /// The kernel's number of it.
    pub id: u32,
    /// Instructions that the verifier walked.
    pub verified_instructions: u32,
    /// Bytes of translated instructions.
    pub size: u32,
}

/// What [`Datapath::retire`] removed.
#[derive(Clone, Default, Debug)]
pub struct Retired {
    /// Map sets of other ABIs.
    pub map_sets: Vec<String>,
    /// Links whose device or cgroup is gone.
    pub links: Vec<Attachment>,
}

/// Where pins are unless something else is asked for.
pub(crate) const PIN_ROOT: &str = "/sys/fs/bpf/cirri";

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions { pin_root: PIN_ROOT.into(), instance: "default".into(), sizes: BTreeMap::new(), hooking: None }
    }
}

/// The object, aligned as aya's parser needs it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("CIRRI_BPF_OBJECT"));

impl Datapath {
    /// Loads the programs of this build onto the maps of the instance: those of an earlier run if
    /// they have the right shape, else new ones. Nothing that runs is changed yet.
    pub fn load(options: &LoadOptions) -> Result<Datapath, LoadError> {
        let sizes = sizes(&options.sizes)?;
        let best = features::check(&options.pin_root)?;
        let pins = Pins::open(&options.pin_root, &options.instance)?;
        let found = pins.inspect(&sizes)?;
        if let Found::Unusable(why) = &found {
            tracing::warn!("the maps of the last run cannot be used and are replaced; flows are decided anew: {why}");
        }
        let resumed = found == Found::Usable;
        let dir = if resumed { pins.live() } else { pins.begin()? };
        let loaded = load_onto(&dir, &sizes).and_then(|loaded| {
            if !resumed {
                pins.commit()?;
            }
            Ok(loaded)
        });
        let (ebpf, tables, warnings) = loaded.inspect_err(|_| {
            if !resumed {
                pins.abandon();
            }
        })?;
        Ok(Datapath {
            ebpf,
            pins,
            hooking: options.hooking.unwrap_or(best),
            held: Held::new(),
            tables,
            resumed,
            warnings,
        })
    }

    /// Says that nobody else may use or remove an instance as long as the answer is kept.
    pub fn claim(pin_root: &Path, instance: &str) -> Result<File, LoadError> {
        features::bpffs(pin_root)?;
        Pins::open(pin_root, instance)?.claim()
    }

    /// Whether pins below `pin_root` end with the mount namespace of this process, as under `ip netns exec`, which
    /// hides the machine's BPF file system: the packet path ends with the process then.
    pub fn pins_end_with_us(pin_root: &Path) -> bool {
        features::ends_with_us(pin_root)
    }

    /// The tables.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Whether the maps, and with them flows and rule sets, are those of an earlier run.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// How programs are attached.
    pub fn hooking(&self) -> Hooking {
        self.hooking
    }

    /// What aya warned about while it loaded. Anything here is a fault of the object.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The reader of events. There is one per node: a second call answers `None`.
    pub fn events(&mut self) -> Result<Option<Events>, LoadError> {
        match self.ebpf.take_map(map::EVENTS.name) {
            Some(map) => Ok(Some(Events::new(map, self.tables.clone())?)),
            None => Ok(None),
        }
    }

    /// Removes what earlier runs left and nothing uses any more: links whose device or
    /// cgroup is gone, and maps of other ABIs. Call it once every device is attached.
    pub fn retire(&mut self) -> Result<Retired, LoadError> {
        let links = self.collect_links()?;
        Ok(Retired { map_sets: self.pins.retire_others()?, links })
    }

    /// Removes every map and every attachment by link of an instance. For `cirri lab down` and for
    /// uninstalling; the agent must not be running.
    pub fn purge(pin_root: &Path, instance: &str) -> Result<(), LoadError> {
        Pins::purge(pin_root, instance)
    }

    /// What is attached by a pinned link of an instance, device gone or not.
    pub fn pinned(pin_root: &Path, instance: &str) -> Result<Vec<Attachment>, LoadError> {
        Pins::at(pin_root, instance).map_or(Ok(Vec::new()), |pins| attach::pinned_of(&pins))
    }

    /// The names of the workloads' devices of an instance in the calling thread's namespace, as far as links tell;
    /// none with clsact. Nobody may use the instance.
    pub fn workload_devices(pin_root: &Path, instance: &str) -> Result<Vec<String>, LoadError> {
        Pins::at(pin_root, instance).map_or(Ok(Vec::new()), |pins| {
            let _claim = pins.claim()?;
            attach::workloads(&pins)
        })
    }

    // === Programs ===

    /// A loaded classifier, for `BPF_PROG_TEST_RUN` and for pinning it elsewhere.
    pub fn program_mut(&mut self, name: &str) -> Result<&mut SchedClassifier, LoadError> {
        classifier(&mut self.ebpf, name)
    }

    /// The program before the stack, likewise.
    pub fn edge_mut(&mut self) -> Result<&mut Xdp, LoadError> {
        xdp(&mut self.ebpf, edge::PROGRAM)
    }

    /// Pins a loaded program of any kind on a BPF file system, for tools beside the agent.
    pub fn pin_program(&mut self, name: &str, path: &Path) -> Result<(), LoadError> {
        let failed = |error: aya::pin::PinError| LoadError::Object(format!("{}: {error}", path.display()));
        program(&mut self.ebpf, name)?.pin(path).map_err(failed)
    }

    /// The names of the programs, sorted.
    pub fn program_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.ebpf.programs().map(|(name, _)| name.to_owned()).collect();
        names.sort();
        names
    }

    /// All loaded programs.
    pub fn programs(&self) -> Result<Vec<ProgramStatus>, LoadError> {
        let mut all = Vec::new();
        for (name, program) in self.ebpf.programs() {
            let info =
                program.info().map_err(|error| LoadError::Program { program: name.into(), error: Box::new(error) })?;
            all.push(ProgramStatus {
                name: name.into(),
                id: info.id(),
                verified_instructions: info.verified_instruction_count().unwrap_or_default(),
                size: info.size_translated().unwrap_or_default(),
            });
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// The means to run and time programs without a device. There is one: a second call is refused.
    pub fn trial(&mut self) -> Result<Trial<'_>, LoadError> {
        Trial::new(&mut self.ebpf)
    }
}

fn load_onto(dir: &Path, sizes: &BTreeMap<&'static str, u32>) -> Result<(Ebpf, Tables, Vec<String>), LoadError> {
    let mut loader = EbpfLoader::new();
    // No program is relocated against the kernel's types; parsing them would cost 100 ms.
    loader.btf(None);
    for map in map::ALL {
        loader.map_pin_path(map.name, dir.join(map.name));
    }
    for (name, size) in sizes {
        loader.map_max_entries(name, *size);
    }
    let (ebpf, mut warnings) = warnings::collect(|| loader.load(OBJECT));
    let mut ebpf = ebpf.map_err(|error| LoadError::Load { error: Box::new(error), warnings: warnings.clone() })?;
    let maps = open_set(dir, sizes).map_err(|error| match error {
        LoadError::Map(error @ MapError::Incompatible { .. }) => LoadError::Object(error.to_string()),
        LoadError::Pin { path, .. } => LoadError::Object(format!("it does not make {}", path.display())),
        error => error,
    })?;
    let tables = Tables::new(maps)?;
    load_programs(&mut ebpf, &mut warnings)?;
    for name in attach::programs().chain([trial::WRAP]) {
        classifier(&mut ebpf, name)?;
    }
    for name in [edge::PROGRAM, trial::WRAP_EDGE] {
        xdp(&mut ebpf, name)?;
    }
    for name in socket_hooks::PROGRAMS {
        sock_addr(&mut ebpf, name)?;
    }
    Ok((ebpf, tables, warnings))
}

/// Loads every program, several at once: the verifier takes seconds for all of them on one CPU.
fn load_programs(ebpf: &mut Ebpf, warnings: &mut Vec<String>) -> Result<(), LoadError> {
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    let queue = Mutex::new(ebpf.programs_mut());
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
    LoadError::Program { program: program.into(), error: Box::new(error) }
}

pub(crate) fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, LoadError> {
    program(ebpf, name)?.try_into().map_err(|_| LoadError::Object(format!("{name} is not a classifier")))
}

pub(crate) fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp, LoadError> {
    program(ebpf, name)?.try_into().map_err(|_| LoadError::Object(format!("{name} is no XDP program")))
}

pub(crate) fn sock_addr<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr, LoadError> {
    program(ebpf, name)?.try_into().map_err(|_| LoadError::Object(format!("{name} is no program for sockets")))
}

/// The descriptor of a loaded program, whatever its kind.
pub(crate) fn program_fd<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a ProgramFd, LoadError> {
    let program = program(ebpf, name)?;
    program.fd().map_err(|error| LoadError::Program { program: name.into(), error: Box::new(error) })
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, LoadError> {
    ebpf.program_mut(name).ok_or_else(|| LoadError::Object(format!("there is no program {name}")))
}
