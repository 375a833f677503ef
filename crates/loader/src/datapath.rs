//! Loading, attaching, upgrading.

use std::{
    collections::BTreeMap,
    io,
    mem::ManuallyDrop,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, LinkError, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact},
    },
};
use cirri_abi::map;

use crate::{
    error::{LoadError, MapError, VerifierLog, telling_lines},
    events::Events,
    features::{self, Hooking},
    pins::{Found, Pins, at, open_set},
    sizes::sizes,
    sys,
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
    ebpf: Ebpf,
    pins: Pins,
    hooking: Hooking,
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

/// A program on a device.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Attachment {
    /// The program's name, also that of its hook.
    pub program: String,
    /// The device.
    pub ifindex: u32,
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
    /// Links whose device is gone.
    pub links: Vec<Attachment>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            pin_root: "/sys/fs/bpf/cirri".into(),
            instance: "default".into(),
            sizes: BTreeMap::new(),
            hooking: None,
        }
    }
}

/// The object, aligned as aya's parser needs it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("CIRRI_BPF_OBJECT"));

const WORKLOAD: &[(&str, TcAttachType)] =
    &[("from_workload", TcAttachType::Ingress), ("to_workload", TcAttachType::Egress)];
const NETWORK: &[(&str, TcAttachType)] = &[("from_network", TcAttachType::Ingress)];
const OVERLAY: &[(&str, TcAttachType)] =
    &[("from_overlay", TcAttachType::Ingress), ("to_overlay", TcAttachType::Egress)];

/// Our place among the filters of a clsact qdisc: first, and a handle that nobody else picks.
const FILTER: NlOptions = NlOptions { priority: 1, handle: TcHandle::new(0xc144, 1), classid: None };

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
        Ok(Datapath { ebpf, pins, hooking: options.hooking.unwrap_or(best), tables, resumed, warnings })
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

    // === Attaching ===

    /// Puts the programs on the node's side of a workload's device, replacing those of an earlier
    /// run atomically. Answers the device's number.
    pub fn attach_workload(&mut self, device: &str) -> Result<u32, LoadError> {
        self.attach(device, WORKLOAD)
    }

    /// The same for a device of the node.
    pub fn attach_network(&mut self, device: &str) -> Result<u32, LoadError> {
        self.attach(device, NETWORK)
    }

    /// The same for the overlay device.
    pub fn attach_overlay(&mut self, device: &str) -> Result<u32, LoadError> {
        self.attach(device, OVERLAY)
    }

    /// Takes all programs off a device. Nothing happens if there are none, or if it is gone.
    pub fn detach(&mut self, ifindex: u32) -> Result<(), LoadError> {
        for (path, _) in self.pins.links_now()? {
            if attachment(&path).is_some_and(|it| it.ifindex == ifindex) {
                self.pins.drop_link(&path)?;
            }
        }
        if self.hooking == Hooking::Clsact
            && let Ok(device) = device_name(ifindex)
        {
            for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
                if let Ok(link) =
                    SchedClassifierLink::attached(&device, direction, FILTER.priority, FILTER.handle, FILTER.classid)
                {
                    // Dropping it removes the filter, if there is one.
                    drop(link);
                }
            }
        }
        Ok(())
    }

    /// Everything that is attached by a pinned link, device gone or not.
    pub fn attachments(&self) -> Result<Vec<Attachment>, LoadError> {
        let mut all: Vec<_> = self.pins.links_now()?.iter().filter_map(|(path, _)| attachment(path)).collect();
        all.sort();
        Ok(all)
    }

    /// Removes what earlier runs left and nothing uses any more: links whose device is gone, and
    /// maps of other ABIs. Call it once every device is attached.
    pub fn retire(&mut self) -> Result<Retired, LoadError> {
        let links = self.collect_links()?;
        Ok(Retired { map_sets: self.pins.retire_others()?, links })
    }

    /// Removes the links whose device is gone.
    pub fn collect_links(&mut self) -> Result<Vec<Attachment>, LoadError> {
        let mut collected = Vec::new();
        for (path, info) in self.pins.links_now()? {
            if info.ifindex == 0 {
                self.pins.drop_link(&path)?;
                collected.extend(attachment(&path));
            }
        }
        Ok(collected)
    }

    /// Removes every map and every attachment by link of an instance. For `cirri lab down` and for
    /// uninstalling; the agent must not be running.
    pub fn purge(pin_root: &Path, instance: &str) -> Result<(), LoadError> {
        Pins::purge(pin_root, instance)
    }

    // === Programs ===

    /// A loaded program, for `BPF_PROG_TEST_RUN` and for pinning it elsewhere.
    pub fn program_mut(&mut self, name: &str) -> Result<&mut SchedClassifier, LoadError> {
        classifier(&mut self.ebpf, name)
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

    pub(crate) fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    fn attach(&mut self, device: &str, programs: &[(&'static str, TcAttachType)]) -> Result<u32, LoadError> {
        let ifindex = device_number(device)?;
        for &(program, direction) in programs {
            let pin = self.pins.link(program, ifindex);
            let classifier = classifier(&mut self.ebpf, program)?;
            match self.hooking {
                Hooking::Tcx => attach_tcx(classifier, program, direction, device, ifindex, &pin)?,
                Hooking::Clsact => attach_clsact(classifier, direction, device).map_err(attaching(program, device))?,
            }
        }
        // What another version attached here and this one does not.
        for (path, _) in self.pins.links_now()? {
            let stale =
                |it: &Attachment| it.ifindex == ifindex && !programs.iter().any(|(name, _)| *name == it.program);
            if attachment(&path).as_ref().is_some_and(stale) {
                self.pins.drop_link(&path)?;
            }
        }
        Ok(ifindex)
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
    for (name, program) in ebpf.programs_mut() {
        let classifier: &mut SchedClassifier =
            program.try_into().map_err(|_| LoadError::Object(format!("{name} is not a classifier")))?;
        let (loaded, more) = warnings::collect(|| classifier.load());
        warnings.extend(more);
        loaded.map_err(|error| rejected(name, error, &warnings))?;
    }
    for (name, _) in [WORKLOAD, NETWORK, OVERLAY].concat() {
        classifier(&mut ebpf, name)?;
    }
    Ok((ebpf, tables, warnings))
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
    let program = ebpf.program_mut(name).ok_or_else(|| LoadError::Object(format!("there is no program {name}")))?;
    program.try_into().map_err(|_| LoadError::Object(format!("{name} is not a classifier")))
}

/// Replaces the program of the pinned link, or makes the link and pins it.
fn attach_tcx(
    classifier: &mut SchedClassifier,
    program: &'static str,
    direction: TcAttachType,
    device: &str,
    ifindex: u32,
    pin: &Path,
) -> Result<(), LoadError> {
    match sys::open_pin(pin) {
        Ok(fd) => {
            let info = sys::link_info(fd.as_fd()).map_err(at(pin, "ask for its link"))?;
            if info.ifindex == ifindex {
                // The number alone does not name a device: another namespace may have it too.
                let (_, here) = SchedClassifier::query_tcx(device, direction).map_err(attaching(program, device))?;
                if !here.iter().any(|other| other.id() == info.program) {
                    return Err(LoadError::ForeignLink { path: pin.to_owned(), ifindex });
                }
                let link = PinnedLink::from_pin(pin).and_then(|link| FdLink::from(link).try_into());
                let link: SchedClassifierLink = link.map_err(attaching(program, device))?;
                let id = classifier.attach_to_link(link).map_err(attaching(program, device))?;
                // The pin that is there keeps it; aya must only not hold it any more.
                return classifier.take_link(id).map(drop).map_err(attaching(program, device));
            }
            std::fs::remove_file(pin).map_err(at(pin, "unpin"))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(at(pin, "open")(error)),
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = classifier.attach_with_options(device, direction, options).map_err(attaching(program, device))?;
    let link = classifier.take_link(id).map_err(attaching(program, device))?;
    let link: FdLink = link.try_into().map_err(|error: LinkError| attaching(program, device)(error))?;
    link.pin(pin).map_err(attaching(program, device))?;
    Ok(())
}

/// Replaces our filter, or makes it.
fn attach_clsact(
    classifier: &mut SchedClassifier,
    direction: TcAttachType,
    device: &str,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let ours = SchedClassifierLink::attached(device, direction, FILTER.priority, FILTER.handle, FILTER.classid)?;
    let id = match classifier.attach_to_link(ours) {
        Ok(id) => id,
        Err(_) => {
            // There is no such filter yet. The qdisc may be there already, from others; if adding
            // it fails for another reason, attaching fails too and says so.
            let qdisc = qdisc_add_clsact(device);
            let options = TcAttachOptions::Netlink(FILTER);
            classifier.attach_with_options(device, direction, options).map_err(|error| match qdisc {
                Ok(()) => error.to_string(),
                Err(qdisc) => format!("{error} (adding clsact: {qdisc})"),
            })?
        }
    };
    // The filter shall stay when this process ends; dropping the link would remove it.
    let _kept = ManuallyDrop::new(classifier.take_link(id)?);
    Ok(())
}

fn attaching<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    program: &'static str,
    device: &str,
) -> impl FnOnce(E) -> LoadError {
    let device = device.to_owned();
    move |error| LoadError::Attach { program, device, error: error.into() }
}

fn attachment(pin: &Path) -> Option<Attachment> {
    let (program, ifindex) = pin.file_name()?.to_str()?.rsplit_once('-')?;
    Some(Attachment { program: program.to_owned(), ifindex: ifindex.parse().ok()? })
}

fn device_number(device: &str) -> Result<u32, LoadError> {
    let number = probe_socket().and_then(|socket| Ok(rustix::net::netdevice::name_to_index(socket, device)?));
    number.map_err(|_| LoadError::NoDevice { device: device.into() })
}

fn device_name(ifindex: u32) -> io::Result<String> {
    Ok(rustix::net::netdevice::index_to_name(probe_socket()?, ifindex)?)
}

fn probe_socket() -> io::Result<std::net::UdpSocket> {
    std::net::UdpSocket::bind("0.0.0.0:0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_link_names_its_program_and_its_device() {
        let pin = Path::new("/sys/fs/bpf/cirri/default/links/from_workload-12");
        assert_eq!(attachment(pin), Some(Attachment { program: "from_workload".into(), ifindex: 12 }));
    }
}
