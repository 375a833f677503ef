//! The node's agent: one owner of all state ([`core::Core`]), and tasks that carry things in and out.
//!
//! Everything runs on one thread. What may take long (the store) is awaited without the lock; what
//! is done under it takes milliseconds.

mod allocate;
mod announce;
mod attach;
mod catch_up;
mod check;
mod cleanup;
mod core;
mod deletions;
mod desired;
mod devices;
mod drift;
mod dump;
mod endpoint;
mod flows;
mod inside;
mod latency;
mod ledger;
mod mirror;
mod narrowed;
mod node;
mod policies;
mod pools;
mod problems;
mod queries;
mod ready;
mod reconcile;
mod records;
mod rows;
mod rulesets;
mod server;
mod services;
mod slots;
mod start;
mod status;
mod table;
mod tasks;
mod view;
mod wait;
mod wanted;
mod ways;
mod withdraw;

use std::net::IpAddr;
use std::os::unix::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use cirri_abi::FlowEvent;
use cirri_flow::{Decoder, Ring};
use cirri_loader::net::{ForeignRoutes, Neighbours, NetworkNews};
use cirri_store::{Embedded, Store, folder};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, Notify, broadcast, watch};
use tokio::task::LocalSet;

use self::core::Core;
use crate::api::{ConfigValue, StoreStatus};
use crate::config::Loaded;
use crate::exit::{Because, Failure, Result};
use crate::listener::ServerSocket;

pub use cleanup::cleanup;
pub use drift::{
    EVERY as COMPARE_EVERY, Findings, Instead, OpenFile, Pace, Repairs, cpu_time, judge as judge_programs,
};
pub use node::{IPV6_MTU, has_ipv6};
pub use problems::{Finding, Problems};
pub use queries::counters_by_name;
pub use services::{Reach, changed as changed_services};
pub use services::{carry_out as write_services, found as found_services};
pub use start::notify;
pub use status::resident_memory;

/// What the agent's tasks share.
pub struct Shared {
    core: Mutex<Core>,
    store: Arc<dyn Store>,
    /// The last good content of what the store holds.
    saved: Embedded,
    /// The store, if it is this agent's own.
    mirror: Option<Embedded>,
    config_values: Vec<ConfigValue>,
    started: Instant,
    /// Kernel tables have rows to work on.
    wake: Notify,
    /// The store has rows to work on.
    publish: Notify,
    /// Labels want numbers.
    number: Notify,
    /// Services have other local backends.
    health: Notify,
    /// Sockets must end.
    sockets: Notify,
    /// Newest revision enforced, none before the first; sent after every pass.
    enforced: watch::Sender<Option<u64>>,
    /// Asks the folder of manifests, if there is one, what is in it now.
    catch_up: Option<folder::CatchUp>,
    /// The last question to the folder whose answer is in the store.
    mirrored: watch::Sender<u64>,
    /// Newest revision that was seen whole; sent after everything that the store says.
    seen: watch::Sender<u64>,
    /// Sent after every pass of the publisher.
    settled: watch::Sender<()>,
    store_status: std::sync::Mutex<StoreStatus>,
    ring: Ring,
    decoder: Decoder,
    events: broadcast::Sender<FlowEvent>,
    events_seen: AtomicU64,
    events_lost: AtomicU64,
}

/// How long to wait for the store before the socket opens all the same.
const START_PATIENCE: Duration = Duration::from_secs(3);

/// Runs the agent until it is told to stop. Stopping leaves the packet path at work.
pub async fn run(loaded: Loaded) -> Result<()> {
    LocalSet::new().run_until(run_local(loaded)).await
}

async fn run_local(loaded: Loaded) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).because(Failure::Failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).because(Failure::Failed)?;
    let config = loaded.config.clone();
    start::allow_files();
    // What may fail before anything is made that would stay.
    let socket = config.socket();
    SocketAddr::from_pathname(&socket)
        .map_err(|error| format!("cannot listen on {}: {error}", socket.display()))
        .because(Failure::BadInput)?;
    let routes = ForeignRoutes::here().because(Failure::Failed)?;
    let neighbours = Neighbours::here().because(Failure::Failed)?;
    let news = NetworkNews::here().because(Failure::Failed)?;
    let lock = start::lock(&config)?;
    let start::Started { shared, events, folder } = match start::start(loaded).await {
        Ok(started) => started,
        Err(error) => {
            lock.give_up(&config);
            return Err(error);
        }
    };

    let lasting = crate::pinned::check(&config.bpf.pin_root);

    let spawn = |task| drop(tokio::task::spawn_local(task));
    spawn(Box::pin(tasks::watch(Arc::clone(&shared))) as std::pin::Pin<Box<dyn Future<Output = ()>>>);
    spawn(Box::pin(tasks::reconcile(Arc::clone(&shared))));
    spawn(Box::pin(tasks::routes(Arc::clone(&shared), routes)));
    spawn(Box::pin(tasks::neighbours(Arc::clone(&shared), neighbours)));
    spawn(Box::pin(drift::watch(Arc::clone(&shared), news)));
    spawn(Box::pin(tasks::publish(Arc::clone(&shared))));
    spawn(Box::pin(tasks::number(Arc::clone(&shared))));
    spawn(Box::pin(tasks::join(Arc::clone(&shared))));
    spawn(Box::pin(tasks::health(Arc::clone(&shared))));
    spawn(Box::pin(flows::collect(Arc::clone(&shared))));
    spawn(Box::pin(services::serve_health(Arc::clone(&shared))));
    spawn(Box::pin(services::end_sockets(Arc::clone(&shared))));
    if let Some(events) = events {
        spawn(Box::pin(flows::follow(Arc::clone(&shared), events)));
    }
    if let Some(mirror) = folder {
        spawn(Box::pin(mirror::run(Arc::clone(&shared), mirror)));
    }

    // Those who ask right after the start find a node that is whole; if the store is away they can
    // at least ask why.
    let mut enforced = shared.enforced.subscribe();
    let whole = enforced.wait_for(Option::is_some);
    tokio::select! {
        _ = tokio::time::timeout(START_PATIENCE, whole) => {}
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    // First what was asked for while the agent was away: a new ADD may be for the same container.
    deletions::carry_out(&shared).await;
    let server_socket = ServerSocket::open(socket.clone()).because(Failure::Failed)?;
    shared.core.lock().await.drift.server_socket = Some(Arc::clone(&server_socket));
    spawn(Box::pin(server::serve(Arc::clone(&shared), Arc::clone(&server_socket))));
    spawn(Box::pin(deletions::follow(Arc::clone(&shared))));
    start::notify("READY=1");
    tracing::info!(socket = %socket.display(), "ready");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    start::notify("STOPPING=1");
    crate::pinned::tell_end(lasting);
    server_socket.close().because(Failure::Failed)
}

impl Shared {
    /// What is known changed: desires anew and wakes those who act on it.
    async fn changed(&self) {
        self.core.lock().await.desire();
        self.desired();
    }

    /// Wakes those who act on what is desired.
    fn desired(&self) {
        self.wake.notify_one();
        self.health.notify_one();
        self.publish.notify_one();
        self.number.notify_one();
    }

    /// Returns when the records of these addresses of this node are in the store.
    async fn published(&self, addresses: impl Iterator<Item = IpAddr>) {
        let addresses: Vec<IpAddr> = addresses.collect();
        let mut settled = self.settled.subscribe();
        loop {
            {
                let core = self.core.lock().await;
                let done = |ip: &IpAddr| {
                    let key = records::ip_key(&core.node.name, *ip);
                    core.rows.published.state(&key).as_deref() == Some("done")
                };
                if addresses.iter().all(done) {
                    return;
                }
            }
            if settled.changed().await.is_err() {
                return;
            }
        }
    }
}
