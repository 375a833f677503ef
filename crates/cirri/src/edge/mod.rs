//! The load balancer that runs alone: a file says what is balanced to whom, and the packet path does it.
//!
//! No agent, no cluster, no store. [`plan`] makes sense of the file, [`core`] holds what is in force and
//! makes the kernel's tables like it, [`devices`] puts the programs where packets come in, [`health`]
//! finds out who serves. Everything runs on one thread; what takes long is awaited without the lock.
//!
//! The packet path does not need the process: it goes on while the process is stopped, killed or
//! replaced, and the next one takes over what it finds.

pub mod api;
pub mod backend;
mod config;
mod core;
mod devices;
mod drift;
mod drops;
mod follow;
mod found;
mod health;
mod plan;
mod pools;
mod report;
mod server;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use cirri_abi::epoch_slot;
use cirri_loader::gc::{self, Collector};
use cirri_loader::net::{DeviceNews, ForeignRoutes, NeighbourChange, Neighbours, Net};
use cirri_loader::{Datapath, Events, LoadOptions, Use, is_being_written};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{Mutex, Notify};
use tokio::task::LocalSet;

use self::api::ConfigStatus;
use self::core::{ApplyError, Core, RETRY};
use self::devices::{Attached, Machine, MachineError};
use self::drift::Drift;
use self::drops::Drops;
use self::health::{Checks, Outcome};
use self::watch::Watch;
use crate::agent::notify;
use crate::config::Acceleration;
use crate::exit::{Because, Error, Failure, Result};
use crate::listener::ServerSocket;
use crate::settings::{Made, Settings};

pub use self::config::STATE_DIR;
pub use self::plan::Plan;

/// What the tasks share.
pub struct Shared {
    core: Mutex<Core>,
    machine: Mutex<Here>,
    drops: std::sync::Mutex<Drops>,
    config: std::sync::Mutex<ConfigState>,
    file: PathBuf,
    started: Instant,
    /// The kernel refused something, which is to be tried again.
    wake: Notify,
}

/// The machine and its devices.
struct Here {
    net: Net,
    settings: Settings,
    datapath: Datapath,
    machine: Machine,
    attached: Attached,
    /// Addresses of pools that were on devices when the file was read.
    stood: BTreeSet<IpAddr>,
    /// What the kernel refuses of devices or addresses now.
    trouble: Option<String>,
    /// How the kernel drifts.
    drift: Drift,
}

/// The file, as far as it is in force.
struct ConfigState {
    read: Instant,
    loads: u64,
    error: String,
}

/// Outcomes of checks that are taken in at once.
const OUTCOMES: usize = 1024;
/// How often flow tables are swept while there is something to do, and how many entries at a time: a load balancer's fill quickly.
const SWEEP_EVERY: Duration = Duration::from_millis(250);
const SWEEP_BUDGET: usize = 32_768;

/// What a load balancer keeps in its state directory, the lock last.
const STATE_FILES: [&str; 3] = ["lb.sock", core::DRAINED, "lb.lock"];

/// The socket of the load balancer with this state directory.
pub fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("lb.sock")
}

/// Runs until it is told to stop. Stopping leaves the packet path at work.
pub async fn run(file: PathBuf, plan: Plan) -> Result<()> {
    LocalSet::new().run_until(run_local(file, plan)).await
}

/// Takes everything away that the load balancer of this plan made, and puts back settings. It must not be running.
pub async fn remove(plan: &Plan) -> Result<()> {
    let lock = lock(plan)?;
    let removed = remove_all(plan).await;
    if removed.is_err() {
        lock.give_up(plan);
    }
    removed
}

async fn remove_all(plan: &Plan) -> Result<()> {
    let net = Net::here().because(Failure::Failed)?;
    discard(plan, &net).await?;
    forget(plan).because(Failure::Failed)?;
    let mut settings = Settings::of(&net, owner(plan)).because(Failure::Failed)?;
    settings.remove_directories(None).because(Failure::Failed)
}

/// Removes what is kept in the state directory, and the directory if nothing else is in it.
fn forget(plan: &Plan) -> std::io::Result<()> {
    for name in STATE_FILES {
        crate::files::remove(&plan.state_dir.join(name))?;
    }
    crate::files::remove_empty(&plan.state_dir)
}

/// Removes programs and pins, and puts back settings.
async fn discard(plan: &Plan, net: &Net) -> Result<()> {
    Datapath::purge(&plan.bpf.pin_root, &plan.bpf.instance).because(Failure::Failed)?;
    let mut settings = Settings::of(net, owner(plan)).because(Failure::Failed)?;
    let put_back = settings.release().await.because(Failure::Failed)?;
    tracing::info!(?put_back, "settings are as they were");
    Ok(())
}

/// The name that a load balancer's settings are recorded under.
fn owner(plan: &Plan) -> String {
    format!("lb {}", plan.bpf.instance)
}

async fn run_local(file: PathBuf, plan: Plan) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).because(Failure::Failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).because(Failure::Failed)?;
    let lock = lock(&plan)?;
    let begun = match watch_and_begin(file, plan.clone()).await {
        Ok(begun) => begun,
        Err(error) => {
            lock.give_up(&plan);
            return Err(error);
        }
    };
    let Begun { watch, routes, devices, neighbours, started: (shared, outcomes, events) } = begun;
    let lasting = crate::pinned::check(&plan.bpf.pin_root);

    let spawn = |task: Pin<Box<dyn Future<Output = ()>>>| drop(tokio::task::spawn_local(task));
    spawn(Box::pin(reload(Arc::clone(&shared), watch)));
    spawn(Box::pin(follow_checks(Arc::clone(&shared), outcomes)));
    spawn(Box::pin(follow::watch(Arc::clone(&shared), routes, devices)));
    spawn(Box::pin(follow_neighbours(Arc::clone(&shared), neighbours)));
    spawn(Box::pin(catch_up(Arc::clone(&shared))));
    spawn(Box::pin(drift::watch(Arc::clone(&shared))));
    spawn(Box::pin(collect(Arc::clone(&shared))));
    if let Some(events) = events {
        spawn(Box::pin(follow_drops(Arc::clone(&shared), events)));
    }
    let socket = socket(&shared.core.lock().await.plan.state_dir);
    let server_socket = ServerSocket::open(socket.clone()).because(Failure::Failed)?;
    shared.machine.lock().await.drift.watch(Arc::clone(&server_socket));
    spawn(Box::pin(server::serve(Arc::clone(&shared), Arc::clone(&server_socket))));
    notify("READY=1");
    tracing::info!(socket = %socket.display(), "ready");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    notify("STOPPING=1");
    crate::pinned::tell_end(lasting);
    server_socket.close().because(Failure::Failed)
}

/// A load balancer that has begun, and what it shall hear of.
struct Begun {
    watch: Watch,
    routes: ForeignRoutes,
    devices: DeviceNews,
    neighbours: Neighbours,
    started: Started,
}

/// Watched before anything is read: no change is missed.
async fn watch_and_begin(file: PathBuf, plan: Plan) -> Result<Begun> {
    let watch = Watch::new(&file)
        .map_err(|error| format!("cannot watch {}: {error}", file.display()))
        .because(Failure::Failed)?;
    let routes = ForeignRoutes::here().because(Failure::Failed)?;
    let devices = DeviceNews::here().because(Failure::Failed)?;
    let neighbours = Neighbours::here().because(Failure::Failed)?;
    let started = begin(file, plan).await?;
    Ok(Begun { watch, routes, devices, neighbours, started })
}

/// The state directory, which no other load balancer uses as long as this is kept.
struct Lock {
    _file: File,
    made: Made,
}

impl Lock {
    /// Who took it fails: what was not there before is gone after that.
    fn give_up(self, plan: &Plan) {
        self.made.remove(|| forget(plan));
    }
}

/// Makes sure that this is root, and takes the state directory.
fn lock(plan: &Plan) -> Result<Lock> {
    if !rustix::process::geteuid().is_root() {
        return Err(
            Error::new(Failure::Failed, "the load balancer loads programs into the kernel").hint("run it as root")
        );
    }
    let made = Made::record(owner(plan), &plan.state_dir, &plan.bpf.pin_root).because(Failure::Failed)?;
    match lock_file(&plan.state_dir) {
        Ok(file) => Ok(Lock { _file: file, made }),
        Err(error) => {
            // Another one may have begun at the same moment, and have the lock: what is in there is its.
            made.leave_directories();
            Err(error)
        }
    }
}

fn lock_file(state_dir: &Path) -> Result<File> {
    let wrong = |error: std::io::Error| format!("cannot use stateDir {}: {error}", state_dir.display());
    match crate::files::lock_in(state_dir, "lb.lock").map_err(wrong).because(Failure::Failed)? {
        Some(lock) => {
            crate::files::sweep(state_dir, |name| STATE_FILES.contains(&name));
            Ok(lock)
        }
        None => Err(Error::new(Failure::Failed, format!("a load balancer runs with {}", state_dir.display()))
            .hint("stop it first, or give this one its own stateDir and bpf.instance")),
    }
}

type Started = (Arc<Shared>, UnboundedReceiver<Outcome>, Option<Events>);

/// Starts. What an earlier process left stays at work if that fails; a first one leaves nothing.
async fn begin(file: PathBuf, plan: Plan) -> Result<Started> {
    let instance = Datapath::claim(&plan.bpf.pin_root, &plan.bpf.instance).because(Failure::Failed)?;
    let net = Net::here().because(Failure::Failed)?;
    let settings = Settings::of(&net, owner(&plan)).because(Failure::Failed)?;
    let known = settings.is_known().because(Failure::Failed)?;
    match start(file, plan.clone(), net.clone(), settings).await {
        Ok(started) => {
            started.0.machine.lock().await.datapath.keep_claim(instance);
            Ok(started)
        }
        Err(error) => {
            drop(instance);
            if !known && let Err(left) = discard(&plan, &net).await {
                tracing::warn!(error = %left, "not all of a failed start could be removed; see `cirri lb down`");
            }
            Err(error)
        }
    }
}

/// Tables first, then programs: no packet meets a program that knows half.
async fn start(file: PathBuf, plan: Plan, net: Net, mut settings: Settings) -> Result<Started> {
    let machine = Machine::look(&plan, &net).await.because(Failure::BadInput)?;
    machine.check(&plan, &net).await.because(Failure::BadInput)?;
    let options = LoadOptions {
        pin_root: plan.bpf.pin_root.clone(),
        instance: plan.bpf.instance.clone(),
        sizes: plan.bpf.maps.by_name(),
        hooking: None,
        uses: uses(&plan),
    };
    let mut datapath = Datapath::load(&options).because(Failure::Failed)?;
    for warning in datapath.warnings() {
        tracing::warn!("{warning}");
    }
    let events = datapath.events().because(Failure::Failed)?;
    tracing::info!(v4 = ?machine.v4, v6 = ?machine.v6, resumed = datapath.resumed(), "packet path loaded");

    let tables = datapath.tables().clone();
    devices::apply_settings(&plan, &machine, &net, &mut settings).because(Failure::Failed)?;
    machine.tell(&plan, &tables).because(Failure::Failed)?;
    let (checks, outcomes) = Checks::new();
    let mut core = Core::resume(plan.clone(), tables, checks).because(Failure::Failed)?;
    core.apply(plan.clone()).because(Failure::BadInput)?;
    let mut attached = Attached::default();
    attached.follow(&plan, &machine, &mut datapath, &mut settings).because(Failure::Failed)?;
    let retired = datapath.retire().because(Failure::Failed)?;
    tracing::info!(services = plan.services.len(), ?retired, "in force");
    let shared = Shared {
        core: Mutex::new(core),
        machine: Mutex::new(Here {
            net,
            settings,
            datapath,
            stood: machine.pools_here(&plan),
            machine,
            attached,
            trouble: None,
            drift: Drift::default(),
        }),
        drops: std::sync::Mutex::default(),
        config: std::sync::Mutex::new(ConfigState { read: Instant::now(), loads: 1, error: String::new() }),
        file,
        started: Instant::now(),
        wake: Notify::new(),
    };
    Ok((Arc::new(shared), outcomes, events))
}

/// Reads the file again whenever there is news of it.
async fn reload(shared: Arc<Shared>, mut watch: Watch) {
    loop {
        watch.changed().await;
        // Its writer's end is news again.
        if File::open(&shared.file).is_ok_and(|file| is_being_written(&file) == Some(true)) {
            continue;
        }
        let outcome = load(&shared).await;
        let mut config = shared.config.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(services) => {
                *config = ConfigState { read: Instant::now(), loads: config.loads + 1, error: String::new() };
                tracing::info!(services, "the file is in force");
            }
            Err(error) => {
                tracing::error!(error, "the file is not in force, its last good version is");
                config.error = error;
            }
        }
    }
}

/// Puts the file in force as it is now: all of it, or nothing.
async fn load(shared: &Shared) -> std::result::Result<usize, String> {
    let plan = Plan::read(&shared.file).map_err(|error| error.to_string())?;
    let mut here = shared.machine.lock().await;
    let mut core = shared.core.lock().await;
    let Here { net, settings, datapath, machine, attached, trouble, stood, .. } = &mut *here;
    let told = |error: MachineError| error.to_string();
    if plan.bpf != core.plan.bpf || plan.state_dir != core.plan.state_dir {
        return Err(
            "bpf and stateDir cannot change while the load balancer runs; put them back, or restart it".to_owned()
        );
    }
    let seen = Machine::look(&plan, net).await.map_err(told)?;
    seen.check(&plan, net).await.map_err(told)?;
    let set = devices::apply_settings(&plan, &seen, net, settings).map_err(MachineError::from);
    // Programs may be on a device before there is anything to do for them, not the other way round.
    let applied = match set.and_then(|()| attached.attach(&plan, &seen, datapath)) {
        Ok(()) => core.apply(plan).map_err(|error| (matches!(error, ApplyError::Kernel(_)), error.to_string())),
        Err(error) => Err((false, error.to_string())),
    };
    if let Err((false, error)) = &applied {
        let set = devices::apply_settings(&core.plan, machine, net, settings).map_err(MachineError::from);
        let followed = attached.follow(&core.plan, machine, datapath, settings);
        *trouble = set.and(followed).err().map(|error| error.to_string());
        return Err(error.clone());
    }
    *machine = seen;
    *stood = machine.pools_here(&core.plan);
    machine.tell(&core.plan, &core.tables).map_err(|error| error.to_string())?;
    *trouble = attached.follow(&core.plan, machine, datapath, settings).err().map(|error| error.to_string());
    here.name_flaws(&core.plan);
    applied.map_err(|(_, error)| {
        shared.wake.notify_one();
        error
    })?;
    Ok(core.plan.services.len())
}

/// Takes in what checks say.
async fn follow_checks(shared: Arc<Shared>, mut outcomes: UnboundedReceiver<Outcome>) {
    let mut batch = Vec::new();
    // What came while the tables were written is one more change, however much it is.
    while outcomes.recv_many(&mut batch, OUTCOMES).await > 0 {
        let noted = shared.core.lock().await.note(&batch);
        batch.clear();
        if let Err(error) = noted {
            tracing::error!(%error, "a backend's state is not in the tables");
            shared.wake.notify_one();
        }
    }
}

/// Recipes hold Ethernet addresses: connections ask again when one changed, and when a backend's or the
/// gateway's is found. Until then XDP leaves their packets to TC, where the kernel finds the neighbour.
/// Clients on the machine's own Ethernet come and go, and concern nobody else's connections.
async fn follow_neighbours(shared: Arc<Shared>, mut neighbours: Neighbours) {
    let net = match Net::here() {
        Ok(net) => net,
        Err(error) => return tracing::error!(%error, "neighbours are not watched"),
    };
    let mut known: BTreeMap<(u32, IpAddr), [u8; 6]> = BTreeMap::new();
    match net.neighbours_found().await {
        Ok(found) => known.extend(found.iter().map(|neighbour| ((neighbour.device, neighbour.ip), neighbour.mac))),
        Err(error) => tracing::warn!(%error, "neighbours that are known already cannot be read"),
    }
    while let Some(NeighbourChange { ip, device, mac }) = neighbours.changed().await {
        // One that does not answer keeps its address until it has another.
        let Some(mac) = mac else { continue };
        let concerns = match known.insert((device, ip), mac) {
            Some(before) => before != mac,
            None => is_on_the_way(&shared, &net, ip).await,
        };
        if concerns {
            renew(&*shared.core.lock().await);
        }
    }
    tracing::error!("neighbours are not watched any more");
}

/// Whether packets of services go to this neighbour, as far as can be told.
async fn is_on_the_way(shared: &Shared, net: &Net, ip: IpAddr) -> bool {
    let backend = {
        let core = shared.core.lock().await;
        core.plan.services.iter().flat_map(|service| &service.backends).any(|backend| backend.address == ip)
    };
    // Without an answer it is better to ask once too often.
    backend || net.default_route(ip.is_ipv6()).await.map_or(true, |route| route.is_some_and(|it| it.via == Some(ip)))
}

fn renew(core: &Core) {
    if let Err(error) = core.tables.bump(epoch_slot::NODE) {
        tracing::error!(%error, "established connections may go on by a way that is gone");
    }
}

/// Tries again what the kernel refused.
async fn catch_up(shared: Arc<Shared>) {
    loop {
        shared.wake.notified().await;
        loop {
            tokio::time::sleep(RETRY).await;
            match shared.core.lock().await.catch_up() {
                Ok(()) => {
                    shared.config.lock().unwrap_or_else(PoisonError::into_inner).error.clear();
                    break tracing::info!("the kernel's tables are as they shall be");
                }
                Err(error) => tracing::error!(%error, "the kernel's tables are not as they shall be"),
            }
        }
    }
}

/// Keeps who was dropped.
async fn follow_drops(shared: Arc<Shared>, mut events: Events) {
    loop {
        match events.next().await {
            Ok(batch) => {
                {
                    let mut drops = shared.drops.lock().unwrap_or_else(PoisonError::into_inner);
                    batch.events.iter().for_each(|event| drops.note(event));
                }
                // A flood of drops must not keep the others from their work.
                tokio::task::yield_now().await;
            }
            Err(error) => return tracing::error!(%error, "clients of drops are not told any more"),
        }
    }
}

/// Removes flows that ended, a bounded part of the tables at a time, beside everything else.
async fn collect(shared: Arc<Shared>) {
    let mut collector = Collector::new(shared.core.lock().await.tables.clone());
    loop {
        let swept = tokio::task::spawn_blocking(move || {
            let outcome = collector.sweep(gc::now(), SWEEP_BUDGET);
            (collector, outcome)
        });
        let outcome = match swept.await {
            Ok((back, outcome)) => {
                collector = back;
                outcome
            }
            Err(error) => return tracing::error!(%error, "flows that ended stay until the tables are full"),
        };
        let pause = match outcome {
            Ok(swept) => swept.pause(SWEEP_EVERY),
            Err(error) => {
                tracing::warn!(%error, "flows that ended stay until the next sweep");
                SWEEP_EVERY
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// What the load balancer's programs will be attached to.
fn uses(plan: &Plan) -> Vec<Use> {
    match plan.acceleration {
        Acceleration::Generic | Acceleration::Native => vec![Use::Network, Use::Edge],
        Acceleration::Off | Acceleration::BestEffort => vec![Use::Network],
    }
}

impl Here {
    /// Where translated connections come from unless their service has a pool.
    fn sources(&self) -> Vec<IpAddr> {
        self.machine.v4.map(IpAddr::V4).into_iter().chain(self.machine.v6.map(IpAddr::V6)).collect()
    }
}

impl ConfigState {
    fn status(&self, file: &Path) -> ConfigStatus {
        ConfigStatus {
            file: file.display().to_string(),
            in_force: self.error.is_empty(),
            error: self.error.clone(),
            age_s: self.read.elapsed().as_secs(),
            loads: self.loads,
        }
    }
}

/// Seconds of the monotonic clock.
fn monotonic_s() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}
