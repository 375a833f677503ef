//! The node's pod ranges. Whose turn it is in them outlives the agent: other nodes that have not heard of it yet take
//! whoever gets an address anew for the one that had it before.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use cirri_control::ipam::{IpamError, Pool, Turn};
use ipnet::IpNet;

use super::core::Core;
use super::records;
use crate::files;

/// Where turns are written down, in the state directory.
pub const FILE: &str = "addresses.json";

const SOON_AGAIN: &str = "after a restart addresses of pods that left may be given out again soon";

impl Core {
    /// The node's ranges are known: reserves in them what its workloads have, and goes on where an earlier run was.
    ///
    /// # Errors
    /// A range has no addresses to give.
    pub fn set_ranges(&mut self, ranges: &[IpNet]) -> Result<(), IpamError> {
        let mut pools = ranges.iter().map(|range| Pool::new(*range)).collect::<Result<Vec<_>, _>>()?;
        let file = self.turns();
        let turns = read(&file).unwrap_or_else(|error| {
            tracing::warn!(file = %file.display(), %error, "addresses of pods that left may be given out again soon");
            Vec::new()
        });
        for pool in &mut pools {
            turns.iter().for_each(|turn| pool.resume(turn));
        }
        for endpoint in self.endpoints.values() {
            for ip in endpoint.addresses() {
                let family = pools.iter_mut().find(|pool| pool.cidr().addr().is_ipv6() == ip.is_ipv6());
                if let Some(Err(error)) = family.map(|pool| pool.reserve(ip)) {
                    tracing::warn!(endpoint = endpoint.id, %error, "kept, although the node's range does not have it");
                }
            }
        }
        self.pools = pools;
        self.note_given();
        self.touch();
        Ok(())
    }

    /// Where nothing else is known of turns, as after a reboot: what workloads have, and what the others still know of
    /// this node, was given out before.
    pub fn note_given(&mut self) {
        let prefix = records::ip_prefix(&self.node.name);
        let published = self.view.below(&prefix).filter_map(|key| key[prefix.len()..].parse().ok());
        let given: Vec<IpAddr> = self.endpoints.values().flat_map(|it| it.addresses()).chain(published).collect();
        for ip in given {
            self.pools.iter_mut().for_each(|pool| pool.note_given(ip));
        }
    }

    /// Gives addresses back to the node's ranges. Before these are known it is written down for [`Core::set_ranges`].
    pub fn release(&mut self, addresses: &[IpAddr]) {
        if self.pools.is_empty() {
            let noted = read(&self.turns()).map(|mut turns| {
                note_released(&mut turns, addresses);
                self.write_turns(&turns);
            });
            return noted.unwrap_or_else(|error| tracing::warn!(%error, "{SOON_AGAIN}"));
        }
        for ip in addresses {
            for pool in &mut self.pools {
                pool.release(*ip);
            }
        }
        self.save_turns();
    }

    /// Writes down whose turn it is.
    pub fn save_turns(&self) {
        self.write_turns(&self.pools.iter().map(Pool::turn).collect::<Vec<_>>());
    }

    fn write_turns(&self, turns: &[Turn]) {
        let text = serde_json::to_vec(turns).unwrap_or_default();
        if let Err(error) = files::write_atomic(&self.turns(), &text) {
            tracing::warn!(%error, "{SOON_AGAIN}");
        }
    }

    fn turns(&self) -> PathBuf {
        self.config.state_dir.0.join(FILE)
    }
}

fn read(file: &Path) -> std::io::Result<Vec<Turn>> {
    match std::fs::read(file) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn note_released(turns: &mut [Turn], addresses: &[IpAddr]) {
    for turn in turns {
        let here = addresses.iter().filter(|ip| turn.cidr.contains(*ip));
        turn.released.extend(here);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_released_before_the_ranges_are_known_has_its_turn_last() {
        let range: IpNet = "10.1.0.0/29".parse().unwrap();
        let ip = |last: u8| IpAddr::from([10, 1, 0, last]);
        let mut before = Pool::new(range).unwrap();
        let given: Vec<IpAddr> = (0..3).map(|_| before.allocate().unwrap()).collect();
        assert_eq!(given, [ip(1), ip(2), ip(3)]);
        before.release(ip(2));

        let mut turns = vec![before.turn()];
        note_released(&mut turns, &[ip(1), "fd00::1".parse().unwrap()]);
        let mut after = Pool::new(range).unwrap();
        turns.iter().for_each(|turn| after.resume(turn));
        after.reserve(ip(3)).unwrap();
        let next: Vec<IpAddr> = std::iter::from_fn(|| after.allocate().ok()).collect();
        assert_eq!(next, [ip(4), ip(5), ip(6), ip(2), ip(1)]);
    }
}
