//! Datagram sockets that are connected to a backend that went away. Their packets carry the backend's
//! address, so nothing but their end makes their program ask for the service again.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use cirri_loader::net::{Namespace, NetError, sockets};

use crate::agent::Shared;
use crate::config::SocketMode;

/// Ends them, in the node's network namespace and every workload's, until the agent stops.
pub async fn end(shared: Arc<Shared>) {
    loop {
        shared.sockets.notified().await;
        let (over, workloads) = {
            let mut core = shared.core.lock().await;
            let over = core.serving.take_over();
            if core.config.services.socket.mode == SocketMode::Off {
                continue;
            }
            let workloads: BTreeSet<String> = core.endpoints.values().map(|endpoint| endpoint.netns.clone()).collect();
            (over, workloads)
        };
        if over.is_empty() {
            continue;
        }
        tracing::debug!(?over, "datagram sockets of these backends end");
        // It asks the kernel for every socket of every workload: not on the thread that all else runs on.
        let ended = tokio::task::spawn_blocking(move || end_all(&over, &workloads)).await;
        match ended {
            Ok(0) => {}
            Ok(ended) => tracing::info!(ended, "sockets that were connected to backends that are gone"),
            Err(error) => tracing::error!(%error, "sockets may stay connected to backends that are gone"),
        }
    }
}

fn end_all(over: &BTreeSet<SocketAddr>, workloads: &BTreeSet<String>) -> usize {
    // A namespace that is gone has no sockets.
    let opened = workloads.iter().filter_map(|path| Namespace::open(path).ok());
    let node = Namespace::current();
    if let Err(error) = &node {
        tracing::warn!(%error, "the node's own sockets may stay connected to backends that are gone");
    }
    node.into_iter().chain(opened).map(|namespace| end_in(&namespace, over)).sum()
}

fn end_in(namespace: &Namespace, over: &BTreeSet<SocketAddr>) -> usize {
    match sockets::end_datagrams(namespace, |remote| over.contains(&remote)) {
        Ok(ended) => ended,
        Err(error @ NetError::Unsupported { .. }) => {
            // Said once a namespace would be said for ever.
            tracing::debug!(%error, "sockets stay");
            0
        }
        Err(error) => {
            tracing::warn!(%error, "sockets may stay connected to backends that are gone");
            0
        }
    }
}
