//! Loading, upgrading, and what is loaded.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    EbpfLoader,
    programs::{SchedClassifier, Xdp},
};
use cirri_abi::map;

use crate::{
    attach::{self, Attachment},
    audit::Held,
    edge,
    error::{LoadError, MapError},
    events::Events,
    features::{self, Hooking},
    pins::{Found, Pins, open_set},
    programs::{Programs, in_program},
    rulesets,
    sizes::sizes,
    socket_hooks,
    tables::Tables,
    trial::Trial,
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
    pub(crate) programs: Programs,
    pub(crate) pins: Pins,
    pub(crate) hooking: Hooking,
    /// Links that outlive their pins.
    pub(crate) held: Held,
    /// Inodes of maps' pins that were found to lead to our maps, by the map's name.
    pub(crate) right_pins: BTreeMap<&'static str, u64>,
    /// What was written into `EDGE_DEVICES`, by device.
    pub(crate) edge_devices: BTreeMap<u32, u32>,
    /// The lock on the instance's directory, from [`Datapath::keep_claim`] on.
    pub(crate) claim: Option<File>,
    tables: Tables,
    /// Whether the maps, and with them all flows, came from an earlier run.
    resumed: bool,
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
    /// What the programs will be attached to. Those programs are loaded at once, others when something is
    /// attached to them: no time is lost on what a node does not use.
    pub uses: Vec<Use>,
}

/// What programs are attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    /// Workloads' devices: [`Datapath::attach_workload`].
    Workloads,
    /// The node's devices: [`Datapath::attach_network`].
    Network,
    /// The overlay device: [`Datapath::attach_overlay`].
    Overlay,
    /// The devices of a plain backend host: [`Datapath::attach_unwrap`].
    Unwrap,
    /// The node's devices before the stack: [`Datapath::attach_edge`].
    Edge,
    /// Sockets: [`Datapath::attach_sockets`].
    Sockets,
}

impl Use {
    fn programs(self) -> Vec<&'static str> {
        match self {
            Use::Workloads => attach::names(attach::WORKLOAD),
            Use::Network => attach::names(attach::NETWORK),
            Use::Overlay => attach::names(attach::OVERLAY),
            Use::Unwrap => attach::names(attach::UNWRAP),
            Use::Edge => vec![edge::PROGRAM],
            Use::Sockets => socket_hooks::PROGRAMS.to_vec(),
        }
    }
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
        let (pin_root, instance) = (PIN_ROOT.into(), "default".into());
        LoadOptions { pin_root, instance, sizes: BTreeMap::new(), hooking: None, uses: Vec::new() }
    }
}

/// The object, aligned as aya's parser needs it.
pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("CIRRI_BPF_OBJECT"));

impl Datapath {
    /// Tries whether the kernel has what will be used, and whether this process may use it. Changes nothing, so
    /// that it can come before everything that does.
    pub fn check_kernel() -> Result<(), LoadError> {
        features::check().map(drop)
    }

    /// Loads the programs of this build onto the maps of the instance: those of an earlier run if
    /// they have the right shape, else new ones. Nothing that runs is changed yet.
    pub fn load(options: &LoadOptions) -> Result<Datapath, LoadError> {
        let sizes = sizes(&options.sizes)?;
        let best = features::check()?;
        features::bpffs(&options.pin_root)?;
        let pins = Pins::open(&options.pin_root, &options.instance)?;
        let found = pins.inspect(&sizes)?;
        if let Found::Unusable(why) = &found {
            tracing::warn!("the maps of the last run cannot be used and are replaced; flows are decided anew: {why}");
        }
        let resumed = found == Found::Usable;
        let dir = if resumed { pins.live() } else { pins.begin()? };
        let made = if resumed { Ok(()) } else { rulesets::pin_outer(&dir, sizes[map::RULESETS.name]) };
        let loaded = made.and_then(|()| load_onto(&dir, &sizes, &pins, &options.uses)).and_then(|loaded| {
            if !resumed {
                pins.commit()?;
            }
            Ok(loaded)
        });
        let (programs, tables) = loaded.inspect_err(|_| {
            if !resumed {
                pins.abandon();
            }
        })?;
        let hooking = options.hooking.unwrap_or(best);
        Ok(Datapath {
            programs,
            pins,
            hooking,
            held: Held::new(),
            right_pins: BTreeMap::new(),
            edge_devices: BTreeMap::new(),
            claim: None,
            tables,
            resumed,
        })
    }

    /// Says that nobody else may use or remove an instance as long as the answer is kept.
    pub fn claim(pin_root: &Path, instance: &str) -> Result<File, LoadError> {
        Self::claim_within(pin_root, instance, Duration::ZERO)
    }

    /// The same, but waits for another process that has it, so long at most. For commands that end by themselves.
    pub fn claim_within(pin_root: &Path, instance: &str, patience: Duration) -> Result<File, LoadError> {
        features::bpffs(pin_root)?;
        loop {
            // Whoever had the instance may remove it just then.
            if let Some(claim) = Pins::open(pin_root, instance)?.claim(patience)? {
                return Ok(claim);
            }
        }
    }

    /// The same of an instance that is there; `None`: it is not.
    pub fn claim_if_there(pin_root: &Path, instance: &str, patience: Duration) -> Result<Option<File>, LoadError> {
        Pins::at(pin_root, instance).map_or(Ok(None), |pins| pins.claim(patience))
    }

    /// Keeps what [`Datapath::claim`] answered, and claims the instance again where somebody removed its directory: the
    /// lock went with that.
    pub fn keep_claim(&mut self, claim: File) {
        self.claim = Some(claim);
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
        self.programs.warnings()
    }

    /// The reader of events. There is one per node: a second call answers `None`.
    pub fn events(&mut self) -> Result<Option<Events>, LoadError> {
        match self.programs.object_mut().take_map(map::EVENTS.name) {
            Some(map) => Ok(Some(Events::new(map, self.tables.clone())?)),
            None => Ok(None),
        }
    }

    /// Removes what earlier runs left and nothing uses any more: links whose device or
    /// cgroup is gone, and maps of other ABIs. Call it once every device is attached.
    pub fn retire(&mut self) -> Result<Retired, LoadError> {
        let links = self.collect_links()?;
        self.programs.retire_others()?;
        Ok(Retired { map_sets: self.pins.retire_others()?, links })
    }

    /// Removes every map and every attachment of an instance; filters on kernels without tcx in the calling thread's
    /// namespace only. For `cirri lab down` and for uninstalling; the agent must not be running.
    pub fn purge(pin_root: &Path, instance: &str) -> Result<(), LoadError> {
        Pins::purge(pin_root, instance, None)
    }

    /// The same; `claim` is the caller's claim, if it has one.
    pub fn purge_claimed(pin_root: &Path, instance: &str, claim: Option<&File>) -> Result<(), LoadError> {
        Pins::purge(pin_root, instance, claim)
    }

    /// What is attached of an instance: see [`Datapath::attachments`].
    pub fn attached(pin_root: &Path, instance: &str) -> Result<Vec<Attachment>, LoadError> {
        Pins::at(pin_root, instance).map_or(Ok(Vec::new()), |pins| attach::attached_of(&pins))
    }

    /// The names of the workloads' devices of an instance in the calling thread's namespace. Nobody may use the
    /// instance.
    pub fn workload_devices(pin_root: &Path, instance: &str) -> Result<Vec<String>, LoadError> {
        Pins::at(pin_root, instance).map_or(Ok(Vec::new()), |pins| {
            let _claim = pins.claim(Duration::ZERO)?;
            attach::workloads(&pins)
        })
    }

    // === Programs ===

    /// A loaded classifier, for `BPF_PROG_TEST_RUN` and for pinning it elsewhere.
    pub fn program_mut(&mut self, name: &str) -> Result<&mut SchedClassifier, LoadError> {
        self.programs.classifier(name)
    }

    /// The program before the stack, likewise.
    pub fn edge_mut(&mut self) -> Result<&mut Xdp, LoadError> {
        self.programs.xdp(edge::PROGRAM)
    }

    /// Pins a loaded program of any kind on a BPF file system, for tools beside the agent.
    pub fn pin_program(&mut self, name: &str, path: &Path) -> Result<(), LoadError> {
        let failed = |error: aya::pin::PinError| LoadError::Object(format!("{}: {error}", path.display()));
        self.programs.loaded(name)?.pin(path).map_err(failed)
    }

    /// The names of the programs, sorted.
    pub fn program_names(&self) -> Vec<String> {
        self.programs.names()
    }

    /// All programs; those that were not wanted so far are loaded for it.
    pub fn programs(&mut self) -> Result<Vec<ProgramStatus>, LoadError> {
        let names = self.program_names();
        let borrowed: Vec<&str> = names.iter().map(String::as_str).collect();
        self.programs.load(&borrowed)?;
        let status = |name: String| {
            let info = self.programs.loaded(&name)?.info().map_err(in_program(&name))?;
            Ok(ProgramStatus {
                id: info.id(),
                verified_instructions: info.verified_instruction_count().unwrap_or_default(),
                size: info.size_translated().unwrap_or_default(),
                name,
            })
        };
        names.into_iter().map(status).collect()
    }

    /// The means to run and time programs without a device. There is one: a second call is refused.
    pub fn trial(&mut self) -> Result<Trial<'_>, LoadError> {
        Trial::new(&mut self.programs)
    }
}

/// The object on the maps of a set, with the programs that will be used at once.
fn load_onto(
    dir: &Path,
    sizes: &BTreeMap<&'static str, u32>,
    pins: &Pins,
    uses: &[Use],
) -> Result<(Programs, Tables), LoadError> {
    let mut loader = EbpfLoader::new();
    // No program is relocated against the kernel's types; parsing them would cost 100 ms.
    loader.btf(None);
    for map in map::ALL {
        loader.map_pin_path(map.name, dir.join(map.name));
    }
    for (name, size) in sizes {
        loader.map_max_entries(name, *size);
    }
    let (ebpf, warnings) = warnings::collect(|| loader.load(OBJECT));
    let ebpf = ebpf.map_err(|error| LoadError::Load { error: Box::new(error), warnings: warnings.clone() })?;
    let maps = open_set(dir, sizes).map_err(|error| match error {
        LoadError::Map(error @ MapError::Incompatible { .. }) => LoadError::Object(error.to_string()),
        LoadError::Pin { path, .. } => LoadError::Object(format!("it does not make {}", path.display())),
        error => error,
    })?;
    let tables = Tables::new(maps)?;
    let mut programs = Programs::new(ebpf, OBJECT, pins.programs(), &tables, warnings);
    let names: Vec<&str> = uses.iter().flat_map(|it| it.programs()).collect();
    programs.load(&names)?;
    Ok((programs, tables))
}
