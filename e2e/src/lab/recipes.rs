//! The flow tables as `cirri map dump` shows them.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Deserialize;

use super::{Lab, LabError};

/// Established connections: one recipe per direction, by tuple.
#[derive(Debug, Clone)]
pub struct Recipes(BTreeMap<String, Recipe>);

/// What happens to the packets of one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Packets so far.
    pub packets: u64,
    /// What the decision rested on when it was made.
    pub epoch: String,
    /// All the rest that does not change while the decision stands.
    pub decision: String,
}

#[derive(Deserialize)]
struct Entry {
    key: String,
    value: String,
}

impl Recipes {
    pub(super) fn of(lab: &Lab, node: &str) -> Result<Recipes, LabError> {
        let mut all = BTreeMap::new();
        for map in ["FLOWS4", "FLOWS6"] {
            let entries: Vec<Entry> = lab.ask(node, &["map", "dump", map, "--limit", "0"])?;
            for entry in entries {
                let recipe = Recipe::parse(&entry.value).ok_or_else(|| LabError::Answer {
                    command: format!("cirri map dump {map}"),
                    problem: "no recipe".into(),
                    stdout: entry.value.clone(),
                })?;
                all.insert(entry.key, recipe);
            }
        }
        Ok(Recipes(all))
    }

    /// That of the TCP packets from one address and port to another.
    pub fn tcp(&self, from: SocketAddr, to: SocketAddr) -> Option<&Recipe> {
        self.0.get(&format!("{from} -> {to} proto 6"))
    }

    /// All of them, by tuple.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Recipe)> {
        self.0.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Recipe {
    /// Reads `established local via from-workload 5, 300 -> 301, 4 packets 298 bytes, seen 0 s ago,
    /// epoch 5 of [1, 2, 0], rules 1/1, reply`.
    fn parse(text: &str) -> Option<Recipe> {
        let (before, rest) = text.split_once(" packets ")?;
        let (who, packets) = before.rsplit_once(", ")?;
        let (_, rest) = rest.split_once(" ago, epoch ")?;
        let (epoch, rest) = rest.split_once("], ")?;
        Some(Recipe { packets: packets.parse().ok()?, epoch: format!("{epoch}]"), decision: format!("{who}, {rest}") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_with_every_packet_is_kept_apart_from_the_decision() {
        let text = |packets: u32, seen: u32| {
            format!(
                "established local via from-workload 5, 300 -> 301, {packets} packets 98 bytes, seen {seen} s ago, epoch 5 of [1, 2, 0], rules 1/1, reply"
            )
        };
        let recipe = Recipe::parse(&text(3, 0)).unwrap();
        assert_eq!((recipe.packets, recipe.epoch.as_str()), (3, "5 of [1, 2, 0]"));
        assert_eq!(recipe.decision, "established local via from-workload 5, 300 -> 301, rules 1/1, reply");
        assert_eq!(Recipe::parse(&text(9, 7)).unwrap(), Recipe { packets: 9, ..recipe });
        assert_eq!(Recipe::parse("something else"), None);
    }
}
