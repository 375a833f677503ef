//! Who holds the ports of a source: counted in the flow tables when somebody asks.

use std::collections::HashMap;
use std::net::IpAddr;

use cirri_abi::{Addr, Recipe, Rewrite, Tuple};
use cirri_loader::{MapError, Table, Tables};

use super::api::{PoolClient, PoolStatus};
use crate::config::PortRange;

/// A source of translated connections.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: PortRange,
}

/// Entries looked at at once.
const CHUNK: usize = 4096;
/// Clients that are told of.
const TOLD: usize = 10;

/// Counts. Takes as long as the flow tables are full: run it where it may block.
///
/// # Errors
/// The kernel does not tell.
pub fn count(tables: &Tables, sources: &[Source]) -> Result<Vec<PoolStatus>, MapError> {
    let mut counts: Vec<Count> = sources.iter().map(|_| Count::default()).collect();
    let mut see = |tuple: &Tuple, recipe: &Recipe| {
        if recipe.rewrite & Rewrite::SOURCE == 0 {
            return;
        }
        let (source, port) = (IpAddr::from(recipe.source), recipe.source_port.number());
        let place = sources
            .iter()
            .position(|it| it.addresses.contains(&source) && (it.ports.first..=it.ports.last).contains(&port));
        if let Some(count) = place.and_then(|place| counts.get_mut(place)) {
            count.connections += 1;
            *count.clients.entry(tuple.src).or_default() += 1;
            let to = tuple.rewritten(recipe);
            *count.backends.entry((to.dst, to.dport.be, to.proto)).or_default() += 1;
        }
    };
    each(&tables.flows4, |key, recipe| see(&key.tuple(), recipe))?;
    each(&tables.pending4, |key, recipe| see(&key.tuple(), recipe))?;
    each(&tables.flows6, &mut see)?;
    each(&tables.pending6, &mut see)?;
    Ok(sources.iter().zip(counts).map(|(source, count)| count.status(source)).collect())
}

#[derive(Default)]
struct Count {
    connections: usize,
    clients: HashMap<Addr, usize>,
    /// A port can be used once towards each backend.
    backends: HashMap<(Addr, u16, u8), usize>,
}

impl Count {
    fn status(self, source: &Source) -> PoolStatus {
        let mut clients: Vec<PoolClient> = self
            .clients
            .into_iter()
            .map(|(address, connections)| PoolClient { address: address.into(), connections })
            .collect();
        clients.sort_by_key(|client| (std::cmp::Reverse(client.connections), client.address));
        clients.truncate(TOLD);
        PoolStatus {
            name: source.name.clone(),
            addresses: source.addresses.clone(),
            ports: String::from(source.ports),
            used: self.backends.into_values().max().unwrap_or_default(),
            size: source.ports.count() as usize,
            connections: self.connections,
            clients,
        }
    }
}

fn each<K: cirri_abi::Plain>(table: &Table<K, Recipe>, mut see: impl FnMut(&K, &Recipe)) -> Result<(), MapError> {
    let mut at = None;
    loop {
        let chunk = table.chunk(at.as_ref(), CHUNK)?;
        chunk.entries.iter().for_each(|(key, recipe)| see(key, recipe));
        at = chunk.next;
        if at.is_none() {
            return Ok(());
        }
    }
}
