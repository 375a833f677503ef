//! From a configuration to an agent that knows what an earlier run left.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cirri_flow::{Decoder, Ring};
use cirri_loader::net::{Link, Namespace, Net};
use cirri_loader::{Datapath, Events, LoadOptions, Use};
use cirri_store::{Embedded, Etcd, EtcdOptions, PREFIX, Store, folder};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{Mutex, Notify, broadcast, watch};

use super::core::Core;
use super::drift::OpenFile;
use super::endpoint::Endpoint;
use super::ledger::Found;
use super::node::Node;
use super::problems::Finding;
use super::{Shared, attach, devices, flows, mirror, node, pools};
use crate::api::{ProblemKind, StoreStatus};
use crate::config::{Acceleration, Config, Loaded, RoutingMode, SocketMode, StoreKind};
use crate::exit::{Because, Error, Failure, Result};
use crate::settings::{Made, Settings};

/// An agent whose tasks may begin.
pub struct Started {
    /// What they share.
    pub shared: Arc<Shared>,
    /// The kernel's events.
    pub events: Option<Events>,
    /// The folder of manifests, if there is one.
    pub folder: Option<mirror::Mirror>,
}

/// What an agent keeps in its state directory.
const STATE_DIRECTORIES: [&str; 3] = ["endpoints", "endpoints.copy", "deletions"];
/// The lock last: until then nobody else begins.
const STATE_FILES: [&str; 5] = ["store.redb", "seen.redb", pools::FILE, "agent.sock", "agent.lock"];
/// What is on every workload's device.
const WORKLOAD_PROGRAM: &str = "from_workload";
/// Events that a monitor may be behind.
const MONITOR_BACKLOG: usize = 8192;

/// The state directory, which no other agent uses as long as this is kept.
pub struct Lock {
    _file: File,
    made: Made,
}

/// Makes sure that this is root, and takes the state directory.
pub fn lock(config: &Config) -> Result<Lock> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::new(Failure::Failed, "the agent loads programs into the kernel and sets up devices")
            .hint("run it as root"));
    }
    let state_dir = &config.state_dir.0;
    let made = Made::record(owner(config), state_dir, &config.bpf.pin_root).because(Failure::Failed)?;
    match lock_file(state_dir) {
        Ok(file) => Ok(Lock { _file: file, made }),
        Err(error) => {
            // Another agent may have begun at the same moment, and have the lock: what is in there is its.
            made.leave_directories();
            Err(error)
        }
    }
}

fn lock_file(state_dir: &Path) -> Result<File> {
    let wrong = |error: std::io::Error| format!("cannot use stateDir {}: {error}", state_dir.display());
    match crate::files::lock_in(state_dir, "agent.lock").map_err(wrong).because(Failure::Failed)? {
        Some(lock) => {
            crate::files::sweep(state_dir, |name| STATE_FILES.contains(&name));
            Ok(lock)
        }
        None => Err(Error::new(Failure::Failed, format!("another agent uses {}", state_dir.display()))
            .hint("stop it first, or give this one its own stateDir and bpf.instance")),
    }
}

impl Lock {
    /// Who took it fails: what was not there before is gone after that.
    pub fn give_up(self, config: &Config) {
        self.made.remove(|| forget(config));
    }
}

/// Loads, looks around, and takes over what is there. What an earlier run left stays at work if that fails; a first one
/// leaves nothing.
pub async fn start(loaded: Loaded) -> Result<Started> {
    let config = loaded.config.clone();
    // What may be wrong with the configuration first, before anything is changed.
    let sources = open_store(&config).await?;
    Datapath::check_kernel().because(Failure::Failed)?;
    let attached = Datapath::attached(&config.bpf.pin_root, &config.bpf.instance);
    let instance = Datapath::claim(&config.bpf.pin_root, &config.bpf.instance).because(Failure::Failed)?;
    let net = Net::here().because(Failure::Failed)?;
    let mut settings = Settings::of(&net, owner(&config)).because(Failure::Failed)?;
    // Programs at work are an earlier run's, whether its record is there or not.
    let known = settings.is_known().because(Failure::Failed)? || attached.is_ok_and(|attached| !attached.is_empty());
    let asked = loaded.values.iter().any(|it| it.key == "cluster.podCidrV6" && it.source != "default");
    let started = match node::prepare(&config, asked, &net, &mut settings).await.because(Failure::BadInput) {
        Ok(node) => take_over(loaded, sources, node, net.clone(), settings, instance).await,
        Err(error) => {
            drop(instance);
            Err(error)
        }
    };
    if started.is_err() && !known {
        match Settings::of(&net, owner(&config)) {
            Ok(mut settings) => undo(&config, &net, &mut settings).await,
            Err(error) => tracing::warn!(%error, "a start that failed leaves something; see `cirri agent --cleanup`"),
        }
    }
    started
}

/// Loads the packet path on a node that is prepared.
async fn take_over(
    loaded: Loaded,
    sources: Sources,
    node: Node,
    net: Net,
    settings: Settings,
    instance: File,
) -> Result<Started> {
    let Loaded { config, values } = loaded;
    let Sources { store, folder, saved, spoilt } = sources;
    let (folder, catch_up) = folder.unzip();
    let mirror = folder.as_ref().map(|mirror: &mirror::Mirror| mirror.store.clone());
    let mut datapath = load_datapath(&config)?;
    datapath.keep_claim(instance);
    let events = datapath.events().because(Failure::Failed)?;
    tracing::info!(
        node = node.name, v4 = %node.v4, v6 = ?node.v6, mtu = node.mtu, resumed = datapath.resumed(),
        "packet path loaded"
    );

    let mut core = Core::new(config, node, net, settings, datapath);
    if core.config.store.kind == StoreKind::Etcd {
        core.needed_revision = Some(0);
    }
    core.spoilt_files.extend(spoilt);
    let (seen, _) = saved.list(PREFIX).await.because(Failure::Failed)?;
    core.restore(seen);
    for file in [Some(&saved), mirror.as_ref()].into_iter().flatten() {
        core.drift.files.extend(OpenFile::at(file.path().to_owned()));
    }
    restore(&mut core).await?;
    leave_devices(&mut core)?;
    core.adopt()
        .await
        .map_err(|error| format!("cannot read what an earlier run left: {error:#}"))
        .because(Failure::Failed)?;

    let kind = match core.config.store.kind {
        StoreKind::Folder => "folder",
        StoreKind::Etcd => "etcd",
    };
    let store_status = StoreStatus { kind: kind.to_owned(), ..StoreStatus::default() };
    let shared = Shared {
        ring: Ring::new(core.config.flows.keep),
        decoder: Decoder::new(core.node.name.clone(), boot_time_ns()),
        core: Mutex::new(core),
        store,
        saved,
        mirror,
        config_values: values,
        started: Instant::now(),
        wake: Notify::new(),
        publish: Notify::new(),
        number: Notify::new(),
        health: Notify::new(),
        sockets: Notify::new(),
        enforced: watch::Sender::new(None),
        catch_up,
        mirrored: watch::Sender::new(0),
        seen: watch::Sender::new(0),
        settled: watch::Sender::new(()),
        store_status: std::sync::Mutex::new(store_status),
        events: broadcast::Sender::new(MONITOR_BACKLOG),
        events_seen: AtomicU64::new(0),
        events_lost: AtomicU64::new(0),
    };
    Ok(Started { shared: Arc::new(shared), events, folder })
}

/// The name that an agent's settings are recorded under.
pub fn owner(config: &Config) -> String {
    format!("agent {}", config.bpf.instance)
}

/// Removes what agents keep in the state directory, and the directory if nothing else is in it.
///
/// # Errors
/// The file system's.
pub fn forget(config: &Config) -> std::io::Result<()> {
    let state_dir = &config.state_dir.0;
    for directory in STATE_DIRECTORIES {
        match std::fs::remove_dir_all(state_dir.join(directory)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    for file in STATE_FILES {
        crate::files::remove(&state_dir.join(file))?;
    }
    crate::files::remove_empty(state_dir)
}

/// Takes back what [`node::prepare`] did.
async fn undo(config: &Config, net: &Net, settings: &mut Settings) {
    // Another instance's may be there, or come meanwhile.
    let ours = settings.try_claim(node::CLAIM).unwrap_or(false);
    if ours
        && config.routing.mode == RoutingMode::Overlay
        && let Err(error) = net.delete_link(node::OVERLAY).await
    {
        tracing::warn!(%error, "the overlay device stays");
    }
    if let Err(error) = Datapath::purge(&config.bpf.pin_root, &config.bpf.instance) {
        tracing::warn!(%error, "pins stay");
    }
    if let Err(error) = settings.release().await {
        tracing::warn!(%error, "settings stay as they are; `cirri agent --cleanup` puts them back");
    }
}

/// Lets this process have as many files as it may: it listens in each container, and keeps settings open. By habit that
/// is a thousand.
pub fn allow_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::debug!(%error, "the number of open files stays as it is");
    }
}

/// Tells systemd, if it wants to know. That nobody listens is no reason to stop.
pub fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let bytes = path.as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(Path::new(&path)),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    match sent {
        Ok(_) => {}
        // Some wait for the start alone: nobody listens any more when it stops.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            tracing::debug!(%error, state, "nobody listens on NOTIFY_SOCKET");
        }
        Err(error) => tracing::warn!(%error, state, "NOTIFY_SOCKET cannot be told"),
    }
}

fn load_datapath(config: &Config) -> Result<Datapath> {
    let bpf = &config.bpf;
    let options = LoadOptions {
        pin_root: bpf.pin_root.clone(),
        instance: bpf.instance.clone(),
        sizes: bpf.maps.by_name(),
        hooking: None,
        uses: uses(config),
    };
    let datapath = Datapath::load(&options).because(Failure::Failed)?;
    for warning in datapath.warnings() {
        tracing::warn!("{warning}");
    }
    Ok(datapath)
}

/// What this node's programs will be attached to.
fn uses(config: &Config) -> Vec<Use> {
    let mut uses = vec![Use::Workloads, Use::Network];
    if config.routing.mode == RoutingMode::Overlay {
        uses.push(Use::Overlay);
    }
    if config.services.socket.mode != SocketMode::Off {
        uses.push(Use::Sockets);
    }
    if matches!(config.services.acceleration, Acceleration::Generic | Acceleration::Native) {
        uses.push(Use::Edge);
    }
    uses
}

/// Where the agent knows from what there is.
struct Sources {
    store: Arc<dyn Store>,
    /// The last good content of it.
    saved: Embedded,
    folder: Option<(mirror::Mirror, folder::CatchUp)>,
    /// Files that cannot be used: which, and why and what holds instead.
    spoilt: Vec<(String, String)>,
}

async fn open_store(config: &Config) -> Result<Sources> {
    let state = |name: &str| config.state_dir.0.join(name);
    let saved = async || {
        let saved = Embedded::open(state("seen.redb")).await.because(Failure::Failed)?;
        let instead = "what could not be read any more at the last start is not known";
        let spoilt = set_aside(&saved, &state("seen.redb"), instead);
        Ok((saved, spoilt))
    };
    match config.store.kind {
        StoreKind::Etcd => {
            let etcd = &config.store.etcd;
            let options = EtcdOptions {
                lease_ttl: Duration::from_secs(etcd.lease_seconds),
                ..EtcdOptions::new(etcd.endpoints.clone())
            };
            let store = Arc::new(Etcd::new(&options).because(Failure::BadInput)?);
            let (saved, spoilt) = saved().await?;
            Ok(Sources { store, saved, folder: None, spoilt: spoilt.into_iter().collect() })
        }
        StoreKind::Folder => {
            let store = Embedded::open(state("store.redb")).await.because(Failure::Failed)?;
            let (saved, spoilt) = saved().await?;
            let count = mirror::recover(&store, &saved).await.because(Failure::Failed)?;
            let instead = format!("the {count} objects that were in force are taken from seen.redb");
            if count > 0 {
                tracing::warn!(count, "the store is new, and gets back what was in force from seen.redb");
            }
            let spoilt = set_aside(&store, &state("store.redb"), &instead).into_iter().chain(spoilt).collect();
            let stored = mirror::stored(&store).await.because(Failure::Failed)?;
            let (changes, catch_up) = folder::watch(&config.store.folder, stored, cirri_loader::is_being_written)
                .because(Failure::BadInput)?;
            let mirror = mirror::Mirror { changes, store: store.clone() };
            Ok(Sources { store: Arc::new(store), saved, folder: Some((mirror, catch_up)), spoilt })
        }
    }
}

/// What is said of a store whose file was damaged, and is another now.
fn set_aside(store: &Embedded, file: &Path, instead: &str) -> Option<(String, String)> {
    let aside = store.set_aside()?;
    let why = format!("it could not be used: {}; it is kept as {}, and {instead}", aside.reason, aside.path.display());
    Some((file.display().to_string(), why))
}

/// The workloads of an earlier run that are still there.
async fn restore(core: &mut Core) -> Result<()> {
    let mut lost = Vec::new();
    for found in core.ledger.load_all().because(Failure::Failed)? {
        let Some(mut endpoint) = take_up(core, found).await? else { continue };
        if !is_there(core, &endpoint).await? {
            tracing::info!(endpoint = endpoint.id, pod = endpoint.pod, "its device is gone");
            devices::delete(&core.net, &endpoint).await.because(Failure::Failed)?;
            if let Err(error) = core.ledger.forget(&endpoint) {
                tracing::warn!(endpoint = endpoint.id, %error, "what is written about it stays");
            }
            lost.push(endpoint);
            continue;
        }
        if !core.endpoint_ids.adopt(endpoint.attachment.clone(), endpoint.id) {
            tracing::error!(endpoint = endpoint.id, pod = endpoint.pod, "its number is another's; it is left alone");
            continue;
        }
        if !core.ruleset_slots.adopt(endpoint.ruleset_of(), endpoint.ruleset) {
            // One without takes one when all others have theirs.
            endpoint.ruleset = core.ruleset_slots.get(&endpoint.ruleset_of()).unwrap_or_default();
        }
        if endpoint.netns_cookie == 0 {
            // An earlier version did not ask.
            endpoint.netns_cookie = Namespace::open(&endpoint.netns).and_then(|it| it.cookie()).unwrap_or_default();
        }
        if endpoint.tunnel_identity != 0 {
            let grace = core.config.cluster.identity_grace();
            core.announcing.insert(endpoint.id, Instant::now() + grace);
        }
        let named = (endpoint.namespace.clone(), endpoint.pod.clone());
        core.endpoints.insert(endpoint.id, endpoint);
        core.place(&named);
    }
    for endpoint in lost {
        attach::leave(core, &endpoint, None).await;
    }
    note_strays(core).await
}

/// Takes the programs off devices that an earlier run served and that the configuration does not name any more, and puts
/// back their settings. At once: what the administrator took away must not wait for a store.
fn leave_devices(core: &mut Core) -> Result<()> {
    let Node { devices, overlay, .. } = &core.node;
    let stay = devices.iter().chain(overlay).map(|link| link.index);
    let stay = stay.chain(core.endpoints.values().map(|endpoint| endpoint.ifindex)).collect();
    let left = core.datapath.leave_others(&stay).because(Failure::Failed)?;
    let names: Vec<&str> = devices.iter().map(|link| link.name.as_str()).collect();
    let put_back = core.settings.leave_other_devices(&names).because(Failure::Failed)?;
    if !left.is_empty() {
        tracing::info!(devices = ?left, ?put_back, "not served any more");
    }
    Ok(())
}

/// Names workloads of which nothing but their devices is left. No table will have a row for them, so their packets
/// are dropped by the programs that are on their devices.
async fn note_strays(core: &mut Core) -> Result<()> {
    let attached = core.datapath.attachments().because(Failure::Failed)?.into_iter();
    let attached = attached.filter(|it| it.program == WORKLOAD_PROGRAM).map(|it| it.ifindex);
    // Where programs are attached without links.
    let known = core.tables.devices.entries().because(Failure::Failed)?.into_iter().map(|(ifindex, _)| ifindex);
    let mut devices: BTreeSet<u32> = attached.chain(known).collect();
    devices.retain(|ifindex| core.endpoints.values().all(|endpoint| endpoint.ifindex != *ifindex));
    let links = core.net.links().await.because(Failure::Failed)?;
    core.strays = links.into_iter().filter(|link| devices.contains(&link.index)).collect();
    for link in &core.strays {
        let (object, finding) = stray(link);
        tracing::error!(device = object, found = finding.found, "a workload is lost");
        core.problems.put(ProblemKind::Endpoint, object, finding);
    }
    Ok(())
}

/// What is said of a workload of which nothing but its device is left.
pub fn stray(link: &Link) -> (String, Finding) {
    let whose = link.alias.strip_prefix("cirri ").unwrap_or("an unknown container");
    let found = format!("nothing is known of its workload ({whose}), neither by a file nor by the kernel");
    let finding = Finding::new(found, "delete the container and add it again; until then nothing passes");
    (link.name.clone(), finding.wanted("as it was attached"))
}

/// Of what is written about an endpoint, what agrees with the kernel. What is spoilt is written anew.
async fn take_up(core: &mut Core, found: Found) -> Result<Option<Endpoint>> {
    let Found { said, kept, mut spoilt } = found;
    let (of_files, recorded) = (said.len(), kept.is_some());
    let all: Vec<Endpoint> = said.into_iter().chain(kept).collect();
    let (mut best, mut agreement) = (None, 0);
    for (number, endpoint) in all.iter().enumerate() {
        let now = agreement_with_kernel(core, endpoint).await?;
        if best.is_none() || now > agreement {
            (best, agreement) = (Some(number), now);
        }
    }
    if best.is_some_and(|best| best > 0) && spoilt.is_none() {
        spoilt = Some((core.ledger.file(all[0].id), "it is not what the kernel has".to_owned()));
    }
    let endpoint = best.map(|best| all[best].clone());
    if endpoint.is_some() && agreement == 0 {
        // Its device is gone, and with it all that could be lost.
        return Ok(endpoint);
    }
    // An earlier version told the kernel nothing.
    let mut incomplete = !recorded;
    if let Some((path, why)) = spoilt {
        let from = if best.is_some_and(|best| best < of_files) { "its copy" } else { "what the kernel keeps of it" };
        let outcome = match &endpoint {
            Some(endpoint) => format!("{}/{} is taken up from {from}", endpoint.namespace, endpoint.pod),
            None => "nothing is known of its workload".to_owned(),
        };
        tracing::error!(path = %path.display(), why, outcome, "an endpoint's file cannot be used");
        core.spoilt_files.push((path.display().to_string(), format!("it cannot be used: {why}; {outcome}")));
        incomplete = true;
    }
    if let Some(endpoint) = endpoint.as_ref().filter(|_| incomplete)
        && let Err(error) = core.ledger.save(endpoint)
    {
        tracing::warn!(endpoint = endpoint.id, %error, "it is not written anew");
    }
    Ok(endpoint)
}

/// How much of what a file says is so: its device is there, and the tables have the same row.
async fn agreement_with_kernel(core: &Core, endpoint: &Endpoint) -> Result<u8> {
    if !is_there(core, endpoint).await? {
        return Ok(0);
    }
    let row = core.tables.devices.get(&endpoint.ifindex).because(Failure::Failed)?;
    Ok(if row.is_some_and(|row| row == endpoint.row()) { 2 } else { 1 })
}

async fn is_there(core: &Core, endpoint: &Endpoint) -> Result<bool> {
    if endpoint.ifindex == 0 {
        return Ok(false);
    }
    let device = core.net.find_link_by_index(endpoint.ifindex).await.because(Failure::Failed)?;
    Ok(device.is_some_and(|device| devices::is_of(&device, endpoint)))
}

/// When the monotonic clock started, nanoseconds since 1970.
fn boot_time_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or_default().saturating_sub(flows::monotonic_ns())
}
