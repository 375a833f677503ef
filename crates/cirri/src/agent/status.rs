//! How the agent is doing.

use std::net::IpAddr;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Shared, catch_up};
use crate::api::{ApiError, FlowStatus, Status};
use crate::config::RoutingMode;

/// How long what was written before the question may take to arrive before the agent counts as behind.
const ARRIVAL: Duration = Duration::from_millis(500);

impl Shared {
    /// Everything for `cirri status`.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(super) async fn status(&self) -> Result<Status, ApiError> {
        let mut store = self.store_status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // What has not arrived cannot be in force.
        let is_behind = store.healthy && tokio::time::timeout(ARRIVAL, catch_up::caught_up(self)).await.is_err();
        let mut core = self.core.lock().await;
        store.synced = core.view.synced;
        core.is_behind = is_behind;
        core.note_problems(&store);
        let (kept, capacity) = self.ring.fill();
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: core.node.name.clone(),
            instance: core.config.bpf.instance.clone(),
            abi: format!("{:016x}", cirri_abi::ABI_HASH),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            memory_bytes: resident_memory(),
            routing: match core.config.routing.mode {
                RoutingMode::Overlay => "overlay",
                RoutingMode::Direct => "direct",
            }
            .to_owned(),
            addresses: [IpAddr::V4(core.node.v4)].into_iter().chain(core.node.v6.map(IpAddr::V6)).collect(),
            without_v6: core.node.without_v6.clone().unwrap_or_default(),
            pod_cidrs: core.pools.iter().map(|pool| pool.cidr().to_string()).collect(),
            store,
            seen_revision: core.view.revision,
            enforced_revision: core.enforced_revision,
            is_behind,
            latency: core.latency.info(),
            endpoints: core.endpoints.len(),
            tables: core.rows.status().into_iter().chain([core.serving.status()]).collect(),
            services: core.services_status(),
            peers: core.peer_infos(),
            attachments: core
                .rows
                .attachments
                .iter()
                .map(|(device, attached)| format!("{device} ({})", attached.role))
                .collect(),
            flows: FlowStatus {
                kept,
                capacity,
                seen: self.events_seen.load(Ordering::Relaxed),
                lost: self.events_lost.load(Ordering::Relaxed),
            },
            problems: core.problems.list(),
            repaired: core.repaired(),
            counters: core.counters()?,
        })
    }
}

/// Bytes of memory that the process occupies; 0 if the kernel does not tell.
pub fn resident_memory() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()))
        .unwrap_or_default();
    pages * rustix::param::page_size() as u64
}
