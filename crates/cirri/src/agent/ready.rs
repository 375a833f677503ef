//! Whether ADD would work now: what STATUS asks.

use std::time::Duration;

use super::core::Core;
use super::{Shared, catch_up};
use crate::api::{NotReady, Obstacle, Readiness};
use crate::config::Unseen;

/// How long the store may take to answer. ADD would wait longer; whoever asks for the status asks again.
const PATIENCE: Duration = Duration::from_secs(3);

impl Shared {
    /// What would keep an ADD from working now.
    pub(super) async fn readiness(&self) -> Readiness {
        let (mut obstacles, pods) = {
            let core = self.core.lock().await;
            (core.obstacles(), core.config.pods)
        };
        // Who attaches by what is known does not need it.
        if pods.unseen == Unseen::Refuse {
            let why = match tokio::time::timeout(PATIENCE, catch_up::newest(self)).await {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some(format!("no answer for {} s", PATIENCE.as_secs())),
            };
            obstacles.extend(why.map(|why| {
                let remedy = "bring the store back; see `cirri status`, and `pods.unseen` in the configuration";
                obstacle(NotReady::Store, format!("what the store holds is not known: {why}"), remedy)
            }));
        }
        Readiness { obstacles }
    }
}

impl Core {
    /// The same, as far as the node knows it by itself.
    fn obstacles(&self) -> Vec<Obstacle> {
        let mut found = Vec::new();
        if self.pools.is_empty() {
            let remedy = "see `cirri status`; the store must be reachable once";
            found.push(obstacle(NotReady::NotJoined, "the node has no pod range yet", remedy));
        } else if !self.is_ready() {
            let remedy = "wait; see `cirri status`";
            found.push(obstacle(NotReady::NotJoined, "the store was not seen whole yet", remedy));
        }
        for pool in self.pools.iter().filter(|pool| pool.used() as u64 >= pool.capacity()) {
            let text = format!("all {} addresses of {} are in use", pool.used(), pool.cidr());
            found.push(obstacle(NotReady::Exhausted, text, "delete pods or give the node a larger range"));
        }
        if self.endpoint_ids.is_full() {
            found.push(obstacle(NotReady::Exhausted, "no endpoint number is left on this node", "delete pods"));
        }
        if let Err(error) = self.ledger.is_writable() {
            found.push(obstacle(NotReady::StateDir, error, "make the state directory writable"));
        }
        found
    }
}

fn obstacle(reason: NotReady, found: impl ToString, remedy: &str) -> Obstacle {
    Obstacle { reason, found: found.to_string(), remedy: remedy.to_owned() }
}
