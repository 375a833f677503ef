//! Who was dropped and why: the newest drops' clients by reason, bounded.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use cirri_abi::{CounterIndex, Direction, DropReason, EventKind, FlowEvent, proto};
use cirri_loader::{MapError, Tables};

use super::api::{DropClient, DropStatus};

/// Drops by reason and client since this process started.
#[derive(Debug, Default)]
pub struct Drops {
    clients: BTreeMap<(u8, IpAddr), Client>,
    /// Counts events, to tell what is new.
    clock: u64,
}

#[derive(Debug)]
struct Client {
    drops: u64,
    destination: String,
    /// When it was last dropped, by the clock.
    seen: u64,
}

/// Clients that are remembered at least; of twice as many those that were not seen for longest go.
const REMEMBERED: usize = 2048;
/// Clients that are told of for each reason.
const TOLD: usize = 10;

impl Drops {
    /// Takes in an event; those that are no drops say nothing here.
    pub fn note(&mut self, event: &FlowEvent) {
        if event.kind != EventKind::DROP {
            return;
        }
        self.clock += 1;
        let key = (event.reason, IpAddr::from(event.tuple.src));
        if self.clients.len() >= 2 * REMEMBERED && !self.clients.contains_key(&key) {
            self.forget_half();
        }
        let client =
            self.clients.entry(key).or_insert_with(|| Client { drops: 0, destination: String::new(), seen: 0 });
        client.drops += 1;
        client.seen = self.clock;
        let to = SocketAddr::new(event.tuple.dst.into(), event.tuple.dport.number());
        client.destination = format!("{to}/{}", protocol(event.tuple.proto));
    }

    /// Of many at once: a flood of clients must not cost a look at all of them for each.
    fn forget_half(&mut self) {
        let mut seen: Vec<u64> = self.clients.values().map(|client| client.seen).collect();
        let (_, median, _) = seen.select_nth_unstable(REMEMBERED);
        let median = *median;
        self.clients.retain(|_, client| client.seen >= median);
    }

    /// Drops by reason, most first, with those who had most of them.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn status(&self, tables: &Tables) -> Result<Vec<DropStatus>, MapError> {
        let counters = tables.counters()?;
        let packets = |reason: u8| {
            let of = |direction| counters.get(CounterIndex::reason(reason, direction) as usize);
            [Direction::INGRESS, Direction::EGRESS].into_iter().filter_map(of).map(|counter| counter.packets).sum()
        };
        let mut all: Vec<DropStatus> = DropReason::ALL
            .iter()
            .map(|reason| DropStatus {
                reason: reason.code,
                text: reason.text().to_owned(),
                packets: packets(reason.code),
                clients: self.clients_of(reason.code),
            })
            .filter(|drops| drops.packets > 0 || !drops.clients.is_empty())
            .collect();
        all.sort_by_key(|drops| std::cmp::Reverse(drops.packets));
        Ok(all)
    }

    fn clients_of(&self, reason: u8) -> Vec<DropClient> {
        let mut clients: Vec<DropClient> = self
            .clients
            .iter()
            .filter(|((of, _), _)| *of == reason)
            .map(|((_, address), client)| DropClient {
                address: *address,
                destination: client.destination.clone(),
                drops: client.drops,
            })
            .collect();
        clients.sort_by_key(|client| std::cmp::Reverse(client.drops));
        clients.truncate(TOLD);
        clients
    }
}

fn protocol(number: u8) -> String {
    match number {
        proto::TCP => "TCP".to_owned(),
        proto::UDP => "UDP".to_owned(),
        proto::SCTP => "SCTP".to_owned(),
        proto::ICMP | proto::ICMPV6 => "ICMP".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cirri_abi::{Addr, Port, Tuple};

    fn drop_of(client: [u8; 4], reason: DropReason) -> FlowEvent {
        let tuple = Tuple {
            src: Addr::v4(client),
            dst: Addr::v4([203, 0, 113, 10]),
            dport: Port::new(80),
            proto: proto::TCP,
            ..Tuple::default()
        };
        FlowEvent { kind: EventKind::DROP, reason: reason.code, tuple, ..FlowEvent::default() }
    }

    #[test]
    fn the_guilty_client_stands_first() {
        let mut drops = Drops::default();
        let full = DropReason::NO_MASQUERADE_PORT;
        for client in [[10, 0, 0, 1], [10, 0, 0, 2], [10, 0, 0, 2]] {
            drops.note(&drop_of(client, full));
        }
        drops.note(&drop_of([10, 0, 0, 3], DropReason::NO_BACKEND));
        drops.note(&FlowEvent { kind: EventKind::NEW, ..drop_of([10, 0, 0, 4], full) });
        let clients = drops.clients_of(full.code);
        assert_eq!(clients.len(), 2);
        assert_eq!((clients[0].address.to_string().as_str(), clients[0].drops), ("10.0.0.2", 2));
        assert_eq!(clients[0].destination, "203.0.113.10:80/TCP");
    }

    #[test]
    fn no_flood_of_clients_makes_it_grow_without_end() {
        let mut drops = Drops::default();
        let steady = [192, 0, 2, 1];
        for number in 0..10 * REMEMBERED as u32 {
            drops.note(&drop_of(number.to_be_bytes(), DropReason::NO_BACKEND));
            drops.note(&drop_of(steady, DropReason::NO_BACKEND));
            assert!(drops.clients.len() <= 2 * REMEMBERED);
        }
        let first = &drops.clients_of(DropReason::NO_BACKEND.code)[0];
        assert_eq!((first.address, first.drops), (steady.into(), 10 * REMEMBERED as u64));
    }
}
