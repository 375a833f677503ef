//! Entries of the packet path's maps in words.

use std::fmt::{Debug, Display};

use cirri_abi::{
    Action, Addr, Endpoint, FlowKey4, Hook, Ipcache, Plain, PolicyEntry, Recipe, Rewrite, State, Tick, Tuple,
    ipcache_flag, map, policy_flag, recipe_flag,
};
use cirri_loader::{MapError, Table, Tables};

use super::rows::ipcache_net;
use crate::api::{ApiError, MapEntry};
use crate::workload::mac_text;

/// Up to `limit` entries of a map; 0 for all.
///
/// # Errors
/// There is no such map, it has no entries, or the kernel does not tell.
pub fn dump(tables: &Tables, name: &str, limit: usize) -> Result<Vec<MapEntry>, ApiError> {
    let limit = if limit == 0 { usize::MAX } else { limit };
    let name = name.to_ascii_uppercase();
    let entries = match name.as_str() {
        "FLOWS4" => walk(&tables.flows4, limit, |key| tuple(&FlowKey4::tuple(key)), recipe),
        "FLOWS6" => walk(&tables.flows6, limit, tuple, recipe),
        "PENDING4" => walk(&tables.pending4, limit, |key| tuple(&FlowKey4::tuple(key)), recipe),
        "PENDING6" => walk(&tables.pending6, limit, tuple, recipe),
        "ENDPOINTS" => walk(&tables.endpoints, limit, Addr::to_string, endpoint),
        "DEVICES" => walk(&tables.devices, limit, u32::to_string, endpoint),
        "IPCACHE" => walk(
            &tables.ipcache,
            limit,
            |key| ipcache_net(key).map_or_else(|| format!("{key:?}"), |net| net.to_string()),
            ipcache,
        ),
        "FRAGMENTS" => walk(&tables.fragments, limit, debug, debug),
        "NODE" => tables.node().map(|node| vec![entry("node", debug(&node))]),
        "EPOCHS" => epochs(tables, limit),
        "COUNTERS" => counters(tables, limit),
        "RULESETS" => rulesets(tables, limit),
        other => raw(tables, other, limit),
    };
    entries.map_err(|error| match error {
        MapError::Unknown { .. } | MapError::NoEntries { .. } => ApiError::new("bad-request", error),
        error => ApiError::new("internal", error),
    })
}

fn walk<K: Plain, V: Plain>(
    table: &Table<K, V>,
    limit: usize,
    key_text: impl Fn(&K) -> String,
    value_text: impl Fn(&V) -> String,
) -> Result<Vec<MapEntry>, MapError> {
    let mut entries = Vec::new();
    let mut at = None;
    loop {
        let chunk = table.chunk(at.as_ref(), 1024)?;
        entries.extend(chunk.entries.iter().map(|(key, value)| entry(key_text(key), value_text(value))));
        if entries.len() >= limit {
            entries.truncate(limit);
            return Ok(entries);
        }
        match chunk.next {
            Some(next) => at = Some(next),
            None => return Ok(entries),
        }
    }
}

fn counters(tables: &Tables, limit: usize) -> Result<Vec<MapEntry>, MapError> {
    let counted = tables.counters()?.into_iter().enumerate().filter(|(_, counter)| counter.packets > 0);
    let words = |(index, counter): (usize, cirri_abi::Counter)| {
        entry(
            super::queries::counter_name(index as u32),
            format!("{} packets {} bytes", counter.packets, counter.bytes),
        )
    };
    Ok(counted.take(limit).map(words).collect())
}

fn epochs(tables: &Tables, limit: usize) -> Result<Vec<MapEntry>, MapError> {
    let mut entries = Vec::new();
    for slot in 0..u16::try_from(map::EPOCHS.max_entries - 1).unwrap_or(u16::MAX) {
        let epoch = tables.epoch(slot)?;
        if epoch != 0 && entries.len() < limit {
            entries.push(entry(slot, epoch));
        }
    }
    Ok(entries)
}

fn rulesets(tables: &Tables, limit: usize) -> Result<Vec<MapEntry>, MapError> {
    let mut entries = Vec::new();
    for slot in tables.ruleset_slots()? {
        for (key, value) in tables.read_ruleset(slot)?.into_iter().flatten() {
            let port = match key.prefix_len {
                0..=40 => "any".to_owned(),
                48 => format!("{}/any", key.proto),
                bits => format!("{}/{} ({} bits)", key.proto, u16::from_be_bytes(key.port), bits - 48),
            };
            let direction = cirri_abi::Direction::name(key.direction);
            entries.push(entry(format!("slot {slot} {direction} peer {} {port}", key.peer), policy(&value)));
        }
    }
    entries.truncate(limit);
    Ok(entries)
}

fn raw(tables: &Tables, name: &str, limit: usize) -> Result<Vec<MapEntry>, MapError> {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Ok(tables.dump(name, limit)?.iter().map(|(key, value)| entry(hex(key), hex(value))).collect())
}

fn entry(key: impl Display, value: impl Display) -> MapEntry {
    MapEntry { key: key.to_string(), value: value.to_string() }
}

fn debug(value: &impl Debug) -> String {
    format!("{value:?}")
}

fn tuple(tuple: &Tuple) -> String {
    let end = |ip: Addr, port: u16| if ip.is_v4() { format!("{ip}:{port}") } else { format!("[{ip}]:{port}") };
    format!(
        "{} -> {} proto {}",
        end(tuple.src, tuple.sport.number()),
        end(tuple.dst, tuple.dport.number()),
        tuple.proto
    )
}

fn recipe(recipe: &Recipe) -> String {
    let mut text = format!(
        "{} {} via {} {}, {} -> {}, {} packets {} bytes, seen {} s ago, epoch {} of {:?}, rules {}/{}",
        State::name(recipe.state),
        Action::name(recipe.action),
        Hook::name(recipe.hook),
        recipe.door,
        recipe.src_identity,
        recipe.dst_identity,
        recipe.packets,
        recipe.bytes,
        age(recipe.last_seen),
        recipe.epoch,
        recipe.slots,
        recipe.egress_cookie,
        recipe.ingress_cookie,
    );
    if recipe.flags & recipe_flag::REPLY != 0 {
        text.push_str(", reply");
    }
    if recipe.rewrite & Rewrite::SOURCE != 0 {
        text.push_str(&format!(", source := {} {}", recipe.source, recipe.source_port.number()));
    }
    if recipe.rewrite & Rewrite::DESTINATION != 0 {
        text.push_str(&format!(", destination := {} {}", recipe.destination, recipe.destination_port.number()));
    }
    if recipe.backend != 0 {
        text.push_str(&format!(", backend {}", recipe.backend));
    }
    text
}

fn age(tick: Tick) -> u64 {
    let ticks = cirri_loader::gc::now().count.saturating_sub(tick.count);
    (u64::from(ticks) << Tick::SHIFT) / 1_000_000_000
}

fn endpoint(endpoint: &Endpoint) -> String {
    format!(
        "endpoint {} identity {} device {} mac {} rule set {} {} {}",
        endpoint.id,
        endpoint.identity,
        endpoint.ifindex,
        mac_text(endpoint.mac),
        endpoint.ruleset,
        endpoint.v4,
        endpoint.v6
    )
}

fn ipcache(row: &Ipcache) -> String {
    let mut text = format!("identity {}", row.identity);
    if row.block != 0 {
        text.push_str(&format!(" block {}", row.block));
    }
    if row.peer != 0 {
        let peer = std::net::Ipv4Addr::from(row.peer.to_ne_bytes());
        text.push_str(&format!(" behind {peer} (slot {})", row.slot));
    }
    for (flag, name) in [
        (ipcache_flag::HOST, "host"),
        (ipcache_flag::REMOTE, "remote"),
        (ipcache_flag::LOCAL_POOL, "local-pool"),
        (ipcache_flag::NO_MASQUERADE, "no-masquerade"),
    ] {
        if row.flags & flag != 0 {
            text.push_str(&format!(" {name}"));
        }
    }
    text
}

fn policy(value: &PolicyEntry) -> String {
    let verdict = if value.flags & policy_flag::ALLOW != 0 { "allow" } else { "deny" };
    let audit = if value.flags & policy_flag::AUDIT != 0 { " audit" } else { "" };
    format!("{verdict}{audit} precedence {:#x} cookie {}", value.precedence, value.cookie)
}
