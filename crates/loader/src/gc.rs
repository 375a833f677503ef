//! Collection of flows that ended, bounded in time.
//!
//! The tables evict their oldest entries by themselves when they are full, so nothing depends on
//! this being fast. It keeps what is shown true, frees the ports of masquerade, and leaves room.

use std::time::Duration;

use cirri_abi::{FlowKey4, Plain, Recipe, State, Tick, Tuple, proto, recipe_flag};

use crate::{
    error::MapError,
    table::{Cursor, Table},
    tables::Tables,
};

/// Seconds that a connection may be silent.
pub mod lifetime {
    /// TCP, established.
    pub const TCP_ESTABLISHED: u64 = 8000;
    /// TCP, the handshake is not complete.
    pub const TCP_UNFINISHED: u64 = 60;
    /// TCP, closing.
    pub const TCP_CLOSING: u64 = 10;
    /// Everything else.
    pub const OTHER: u64 = 60;
}

/// Walks the four flow tables in steps and removes connections that ended.
///
/// Remembers where it stopped, so a caller can give it a little at a time.
#[derive(Debug)]
pub struct Collector {
    tables: Tables,
    at: Stage,
    cursor: Option<Cursor>,
    /// Of the walk so far.
    seen: usize,
    removed: usize,
}

/// What one step did.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Swept {
    /// Entries looked at.
    pub seen: usize,
    /// Entries removed; a connection has two.
    pub removed: usize,
    /// Entries that are over, kept because the opposite direction is not.
    pub kept_for_opposite: usize,
    /// Whether the last table came to its end: the next step begins anew.
    pub complete: bool,
    /// Entries looked at since the first table was begun.
    pub seen_so_far: usize,
    /// Entries removed since then.
    pub removed_so_far: usize,
}

/// How long a collector may rest that found little and nothing over. Looking through tables costs their size,
/// however few their entries are; what ends meanwhile stays a little longer.
const REST: Duration = Duration::from_secs(30);
/// So few entries are little.
const FEW: usize = 1024;

impl Swept {
    /// When the next step is due, if steps follow each other at this pace.
    pub fn pause(&self, pace: Duration) -> Duration {
        let quiet = self.complete && self.seen_so_far < FEW && self.removed_so_far == 0;
        if quiet { REST } else { pace }
    }
}

/// Which table is being walked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Pending4,
    Pending6,
    Flows4,
    Flows6,
}

/// Entries looked up at once.
const CHUNK: usize = 512;

impl Collector {
    /// A collector that begins with the unfinished connections.
    pub fn new(tables: Tables) -> Collector {
        Collector { tables, at: Stage::Pending4, cursor: None, seen: 0, removed: 0 }
    }

    /// Looks at about `budget` more entries. An entry goes only together with its opposite
    /// direction, and only when both have been silent for long enough.
    ///
    /// Each is read again right before it is removed. A packet in the microsecond after that is
    /// decided anew by the slow path: it costs time, never the connection.
    pub fn sweep(&mut self, now: Tick, budget: usize) -> Result<Swept, MapError> {
        let mut swept = Swept::default();
        while swept.seen < budget {
            let count = CHUNK.min(budget - swept.seen);
            let from = self.cursor.take();
            self.cursor = match self.at {
                Stage::Pending4 => step(&self.tables.pending4, from, count, now, Orphans::Stay, &mut swept)?,
                Stage::Pending6 => step(&self.tables.pending6, from, count, now, Orphans::Stay, &mut swept)?,
                Stage::Flows4 => step(&self.tables.flows4, from, count, now, Orphans::End, &mut swept)?,
                Stage::Flows6 => step(&self.tables.flows6, from, count, now, Orphans::End, &mut swept)?,
            };
            if self.cursor.is_none() {
                self.at = match self.at {
                    Stage::Pending4 => Stage::Pending6,
                    Stage::Pending6 => Stage::Flows4,
                    Stage::Flows4 => Stage::Flows6,
                    Stage::Flows6 => Stage::Pending4,
                };
                if self.at == Stage::Pending4 {
                    swept.complete = true;
                    break;
                }
            }
        }
        swept.seen_so_far = self.seen + swept.seen;
        swept.removed_so_far = self.removed + swept.removed;
        (self.seen, self.removed) = if swept.complete { (0, 0) } else { (swept.seen_so_far, swept.removed_so_far) };
        Ok(swept)
    }
}

/// Whether a connection is over: this direction and, if its table has it, the opposite one.
///
/// A reset seen on either side closes both; a FIN closes the side that sent it.
pub fn is_over(tuple: &Tuple, recipe: &Recipe, opposite: Option<&Recipe>, now: Tick) -> bool {
    let reset = |recipe: &Recipe| recipe.state == State::CLOSING && recipe.tcp_flags & TCP_RST != 0;
    let was_reset = tuple.proto == proto::TCP && (reset(recipe) || opposite.is_some_and(reset));
    let over = |recipe: &Recipe| {
        let allowed = if was_reset { lifetime::TCP_CLOSING } else { allowed_silence(tuple.proto, recipe.state) };
        silence_ns(recipe, now) > allowed * 1_000_000_000
    };
    over(recipe) && opposite.is_none_or(over)
}

const TCP_RST: u8 = 0x04;

/// Seconds that an entry may be silent.
pub fn allowed_silence(protocol: u8, state: u8) -> u64 {
    match (protocol, state) {
        (proto::TCP, State::ESTABLISHED) => lifetime::TCP_ESTABLISHED,
        (proto::TCP, State::CLOSING) => lifetime::TCP_CLOSING,
        (proto::TCP, _) => lifetime::TCP_UNFINISHED,
        _ => lifetime::OTHER,
    }
}

/// The time now, as [`Recipe::last_seen`] counts it.
pub fn now() -> Tick {
    // The packet path asks for the coarse clock; this one is at most one timer tick ahead of it.
    let time = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    Tick::from_ns(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Nanoseconds since the last packet; none if its tick is ahead of `now`.
fn silence_ns(recipe: &Recipe, now: Tick) -> u64 {
    u64::from(now.count.saturating_sub(recipe.last_seen.count)) << Tick::SHIFT
}

/// A key that is a tuple of its family.
trait FlowKey: Plain + PartialEq {
    fn tuple(&self) -> Tuple;
    fn of(tuple: &Tuple) -> Self;
}

impl FlowKey for FlowKey4 {
    fn tuple(&self) -> Tuple {
        FlowKey4::tuple(self)
    }
    fn of(tuple: &Tuple) -> Self {
        tuple.key4()
    }
}

impl FlowKey for Tuple {
    fn tuple(&self) -> Tuple {
        *self
    }
    fn of(tuple: &Tuple) -> Self {
        *tuple
    }
}

fn step<K: FlowKey>(
    table: &Table<K, Recipe>,
    from: Option<Cursor>,
    count: usize,
    now: Tick,
    orphans: Orphans,
    swept: &mut Swept,
) -> Result<Option<Cursor>, MapError> {
    let chunk = table.chunk(from.as_ref(), count)?;
    swept.seen += chunk.entries.len();
    for (key, recipe) in chunk.entries {
        let tuple = key.tuple();
        // Most are alive and need no second look. Of a connection that was reset, the side that
        // saw the reset leads here.
        if is_over(&tuple, &recipe, None, now) {
            collect(table, &key, now, swept)?;
        } else if orphans == Orphans::End
            && recipe.flags & recipe_flag::ONE_WAY == 0
            && is_settled(&recipe, now)
            && opposite(table, &key, &recipe)?.is_none()
        {
            swept.removed += usize::from(table.delete(&key)?);
        }
    }
    Ok(chunk.next)
}

/// What becomes of an entry whose opposite direction was evicted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Orphans {
    /// Nothing: the packet path itself sees to it.
    Stay,
    /// It goes too. Alone it would go on carrying one direction and leave the other to be refused as a
    /// stranger; its next packet makes both anew.
    End,
}

/// Whether a connection is old enough that both its entries were written.
fn is_settled(recipe: &Recipe, now: Tick) -> bool {
    now.count.saturating_sub(recipe.since.count) > 2
}

/// The entry of the opposite direction. One in its place may belong to another connection by now; it
/// then answers to another.
fn opposite<K: FlowKey>(table: &Table<K, Recipe>, key: &K, recipe: &Recipe) -> Result<Option<(K, Recipe)>, MapError> {
    let tuple = opposite_of(&key.tuple(), recipe);
    let opposite_key = K::of(&tuple);
    let found = table.get(&opposite_key)?.filter(|opposite| K::of(&opposite_of(&tuple, opposite)) == *key);
    Ok(found.map(|opposite| (opposite_key, opposite)))
}

/// Reads both directions afresh and removes them if the connection is over.
fn collect<K: FlowKey>(table: &Table<K, Recipe>, key: &K, now: Tick, swept: &mut Swept) -> Result<(), MapError> {
    let tuple = key.tuple();
    let Some(recipe) = table.get(key)? else { return Ok(()) };
    let opposite = opposite(table, key, &recipe)?;
    if is_over(&tuple, &recipe, opposite.as_ref().map(|(_, opposite)| opposite), now) {
        swept.removed += usize::from(table.delete(key)?);
        if let Some((opposite_key, _)) = opposite.filter(|(opposite_key, _)| opposite_key != key) {
            swept.removed += usize::from(table.delete(&opposite_key)?);
        }
    } else if is_over(&tuple, &recipe, None, now) {
        swept.kept_for_opposite += 1;
    }
    Ok(())
}

/// The tuple that the other direction's packets arrive with.
fn opposite_of(tuple: &Tuple, recipe: &Recipe) -> Tuple {
    tuple.opposite(recipe)
}

#[cfg(test)]
mod tests {
    use cirri_abi::{Addr, Port, Rewrite};

    use super::*;

    const CLIENT: Addr = Addr::v4([10, 0, 0, 1]);
    const SERVER: Addr = Addr::v4([10, 0, 0, 2]);
    const NODE: Addr = Addr::v4([192, 168, 0, 1]);

    fn tuple(protocol: u8) -> Tuple {
        Tuple {
            src: CLIENT,
            dst: SERVER,
            sport: Port::new(40_000),
            dport: Port::new(80),
            proto: protocol,
            ..Tuple::default()
        }
    }

    fn seen(count: u32, state: u8) -> Recipe {
        Recipe { last_seen: Tick { count }, state, ..Recipe::default() }
    }

    /// The first tick at which more than `seconds` have passed since tick 0.
    fn after(seconds: u64) -> Tick {
        Tick { count: ((seconds * 1_000_000_000) >> Tick::SHIFT) as u32 + 1 }
    }

    #[test]
    fn each_state_has_its_time_and_not_a_second_less() {
        let cases = [
            (proto::TCP, State::ESTABLISHED, 8000),
            (proto::TCP, State::NEW, 60),
            (proto::TCP, State::REPLIED, 60),
            (proto::TCP, State::CLOSING, 10),
            (proto::UDP, State::ESTABLISHED, 60),
            (proto::ICMP, State::NEW, 60),
            (proto::SCTP, State::ESTABLISHED, 60),
        ];
        for (protocol, state, seconds) in cases {
            let (tuple, recipe) = (tuple(protocol), seen(0, state));
            assert!(
                is_over(&tuple, &recipe, None, after(seconds)),
                "protocol {protocol} state {state} after {seconds} s"
            );
            let before = Tick { count: after(seconds).count - 1 };
            assert!(!is_over(&tuple, &recipe, None, before), "protocol {protocol} state {state} before {seconds} s");
        }
    }

    #[test]
    fn a_connection_lives_while_one_direction_does() {
        let quiet = seen(0, State::ESTABLISHED);
        let busy = seen(after(60).count, State::ESTABLISHED);
        assert!(!is_over(&tuple(proto::UDP), &quiet, Some(&busy), after(60)));
        assert!(!is_over(&tuple(proto::UDP), &busy, Some(&quiet), after(60)));
        assert!(is_over(&tuple(proto::UDP), &quiet, Some(&quiet), after(60)));
    }

    #[test]
    fn a_reset_closes_both_directions_and_a_fin_only_its_own() {
        let other = seen(0, State::ESTABLISHED);
        let reset = Recipe { tcp_flags: TCP_RST, ..seen(0, State::CLOSING) };
        let fin = Recipe { tcp_flags: 0x01, ..seen(0, State::CLOSING) };
        assert!(is_over(&tuple(proto::TCP), &other, Some(&reset), after(10)));
        assert!(!is_over(&tuple(proto::TCP), &other, Some(&fin), after(10)));
    }

    #[test]
    fn an_entry_ahead_of_the_clock_was_seen_just_now() {
        assert!(!is_over(&tuple(proto::UDP), &seen(500, State::NEW), None, Tick { count: 499 }));
    }

    #[test]
    fn with_masquerade_each_direction_leads_to_the_other() {
        let out =
            Recipe { rewrite: Rewrite::SOURCE, source: NODE, source_port: Port::new(50_000), ..Recipe::default() };
        let back = Recipe {
            rewrite: Rewrite::DESTINATION,
            destination: CLIENT,
            destination_port: Port::new(40_000),
            ..Recipe::default()
        };
        let forward = tuple(proto::TCP);
        let reverse = opposite_of(&forward, &out);
        assert_eq!((reverse.src, reverse.dst, reverse.dport), (SERVER, NODE, Port::new(50_000)));
        assert_eq!(opposite_of(&reverse, &back), forward);
    }

    #[test]
    fn a_collector_rests_only_after_a_whole_walk_that_found_little_and_nothing_over() {
        let pace = Duration::from_millis(500);
        let quiet = Swept { complete: true, seen_so_far: 10, ..Swept::default() };
        assert_eq!(quiet.pause(pace), REST);
        assert_eq!(Swept { complete: false, ..quiet }.pause(pace), pace);
        assert_eq!(Swept { removed_so_far: 1, ..quiet }.pause(pace), pace);
        assert_eq!(Swept { seen_so_far: FEW, ..quiet }.pause(pace), pace);
    }

    #[test]
    fn the_clock_counts_from_boot() {
        let uptime = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec as u64;
        let ticks = Tick::from_ns(uptime * 1_000_000_000).count;
        assert!(now().count.abs_diff(ticks) <= 2);
    }
}
