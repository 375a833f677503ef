//! Whether ADD would work now: what STATUS asks.

use std::time::Duration;

use cirri_control::ipam::Pool;

use super::core::Core;
use super::slots::Slots;
use super::{Shared, catch_up};
use crate::api::{Attachment, NotReady, Obstacle, Readiness};
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
        found.extend(exhausted(&self.pools, &self.endpoint_ids, &self.ruleset_slots));
        if let Err(error) = self.ledger.is_writable() {
            found.push(obstacle(NotReady::StateDir, error, "make the state directory writable"));
        }
        found
    }
}

/// What is used up.
fn exhausted(pools: &[Pool], endpoint_ids: &Slots<Attachment>, ruleset_slots: &Slots<u32>) -> Vec<Obstacle> {
    let mut found = Vec::new();
    for pool in pools.iter().filter(|pool| pool.used() as u64 >= pool.capacity()) {
        let text = format!("all {} addresses of {} are in use", pool.used(), pool.cidr());
        found.push(obstacle(NotReady::Exhausted, text, "delete pods or give the node a larger range"));
    }
    if endpoint_ids.is_full() {
        found.push(obstacle(NotReady::Exhausted, "no endpoint number is left on this node", "delete pods"));
    }
    if ruleset_slots.is_full() {
        let text = "no slot for a rule set is left on this node: pods with labels that none here has are refused";
        found.push(obstacle(NotReady::Exhausted, text, "delete pods, or exclude labels that only name an instance"));
    }
    found
}

fn obstacle(reason: NotReady, found: impl ToString, remedy: &str) -> Obstacle {
    Obstacle { reason, found: found.to_string(), remedy: remedy.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_used_up_is_said() {
        let mut pool = Pool::new("10.0.0.0/30".parse().unwrap()).unwrap();
        let mut ids = Slots::new(1..=1);
        let mut rulesets = Slots::new(1..=2);
        rulesets.take(&300).unwrap();
        pool.allocate().unwrap();
        assert_eq!(exhausted(&[pool.clone()], &ids, &rulesets), []);
        rulesets.take(&301).unwrap();
        let said = |pool: &Pool, ids: &Slots<Attachment>, rulesets: &Slots<u32>| {
            let all = exhausted(std::slice::from_ref(pool), ids, rulesets);
            assert!(all.iter().all(|it| it.reason == NotReady::Exhausted));
            all.iter().map(|it| it.found.clone()).collect::<Vec<_>>().join("; ")
        };
        assert!(said(&pool, &ids, &rulesets).starts_with("no slot for a rule set"));
        pool.allocate().unwrap();
        let attachment = Attachment { network: String::new(), container_id: "a".into(), ifname: "eth0".into() };
        ids.take(&attachment).unwrap();
        let all = said(&pool, &ids, &rulesets);
        assert!(["addresses of 10.0.0.0/30", "endpoint number", "rule set"].iter().all(|it| all.contains(it)), "{all}");
    }
}
