//! Events out of the kernel into the ring of flows, and flows that ended out of the tables.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cirri_abi::FlowEvent;
use cirri_flow::Record;
use cirri_loader::Events;
use cirri_loader::gc::{self, Collector};

use super::Shared;

/// How often flow tables are swept while there is something to do, and how many entries at a time: a full table of half a million
/// is seen through in about two minutes, and no sweep takes longer than a few milliseconds.
const SWEEP_EVERY: Duration = Duration::from_millis(500);
const SWEEP_BUDGET: usize = 4096;

/// Names events and keeps them, until the agent stops.
pub async fn follow(shared: Arc<Shared>, mut events: Events) {
    loop {
        let batch = match events.next().await {
            Ok(batch) => batch,
            Err(error) => {
                tracing::error!(%error, "no more flows: the ring of events cannot be read");
                return;
            }
        };
        let mut records = Vec::with_capacity(batch.events.len() + 1);
        {
            let core = shared.core.lock().await;
            for event in &batch.events {
                records.push(Record::Flow(Box::new(shared.decoder.decode(event, &*core))));
            }
        }
        if batch.lost > 0 {
            shared.events_lost.fetch_add(batch.lost, Ordering::Relaxed);
            records.push(shared.decoder.lost("kernel-ring", batch.lost, monotonic_ns()));
        }
        shared.events_seen.fetch_add(batch.events.len() as u64, Ordering::Relaxed);
        shared.ring.push(records);
        if shared.events.receiver_count() > 0 {
            for event in batch.events {
                // An error says that the last monitor went away just now.
                let _ = shared.events.send(event);
            }
        }
    }
}

/// Removes flows that ended, a bounded part of the tables at a time.
pub async fn collect(shared: Arc<Shared>) {
    let mut collector = Collector::new(shared.core.lock().await.tables.clone());
    loop {
        let pause = match collector.sweep(gc::now(), SWEEP_BUDGET) {
            Ok(swept) => swept.pause(SWEEP_EVERY),
            Err(error) => {
                tracing::warn!(%error, "flows that ended stay until the next sweep");
                SWEEP_EVERY
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Nanoseconds of the monotonic clock, which events are stamped with.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// An event with its numbers, for `cirri monitor`.
pub fn event_json(event: &FlowEvent) -> serde_json::Value {
    serde_json::json!({
        "time_ns": event.time_ns,
        "hook": cirri_abi::Hook::name(event.hook),
        "kind": event.kind,
        "verdict": event.verdict,
        "reason": event.reason,
        "src": format!("{}:{}", event.tuple.src, event.tuple.sport.number()),
        "dst": format!("{}:{}", event.tuple.dst, event.tuple.dport.number()),
        "proto": event.tuple.proto,
        "tcp_flags": event.tcp_flags,
        "icmp": event.icmp,
        "src_identity": event.src_identity.id,
        "dst_identity": event.dst_identity.id,
        "egress_cookie": event.egress_cookie,
        "ingress_cookie": event.ingress_cookie,
        "generation": event.generation,
        "block": event.block,
        "backend": event.backend,
        "endpoint": event.endpoint,
        "ifindex": event.ifindex,
        "out": event.out,
        "direction": cirri_abi::Direction::name(event.direction),
        "action": cirri_abi::Action::name(event.action),
        "flags": event.flags,
        "length": event.length,
    })
}
