//! Entries of the packet path's maps in words.

use std::fmt::{Debug, Display};

use cirri_abi::{
    Action, Addr, Affinity, AffinityKey, Algorithm, Backend, BackendCounter, BackendState, Endpoint, FlowKey4,
    Forwarding, Hook, Ipcache, IpcacheKey, Plain, PolicyEntry, RangeKey, Recipe, Rewrite, Service, ServiceKey,
    SnatPool, State, Tick, Tuple, ipcache_flag, map, policy_flag, recipe_flag, service_flag,
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
        "SERVICES" => walk(&tables.services, limit, service_key, service),
        "BACKENDS" => occupied(&tables.backends, limit, backend),
        "SERVICE_SLOTS" => occupied(&tables.slots, limit, |slot| format!("backend {}", slot.backend)),
        "AFFINITY" => walk(&tables.affinity, limit, affinity_key, affinity),
        "SOURCE_RANGES" => walk(&tables.source_ranges, limit, range, |_| String::new()),
        "SNAT_POOLS" => occupied(&tables.snat_pools, limit, pool),
        "NODE_PORTS" => bits(&tables.node_ports, limit, "port", "served"),
        "IDENTITIES" => bits(&tables.identities, limit, "identity", "known"),
        "BACKEND_COUNTERS" => backend_counters(tables, limit),
        "PER_PACKET" => {
            walk(&tables.per_packet, limit, |cookie| format!("network namespace {cookie}"), |_| String::new())
        }
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

/// The entries of an array that are not zero.
fn occupied<V: Plain + Default + PartialEq>(
    table: &Table<u32, V>,
    limit: usize,
    value_text: impl Fn(&V) -> String,
) -> Result<Vec<MapEntry>, MapError> {
    let mut entries = Vec::new();
    let mut at = None;
    loop {
        let chunk = table.chunk(at.as_ref(), 8192)?;
        let occupied = chunk.entries.iter().filter(|(_, value)| *value != V::default());
        entries.extend(occupied.map(|(index, value)| entry(index, value_text(value))));
        match chunk.next {
            Some(next) if entries.len() < limit => at = Some(next),
            _ => {
                entries.truncate(limit);
                return Ok(entries);
            }
        }
    }
}

fn bits(table: &Table<u32, u64>, limit: usize, what: &str, value: &str) -> Result<Vec<MapEntry>, MapError> {
    let words = table.entries()?;
    let of_word = |(word, bits): &(u32, u64)| {
        let (word, bits) = (*word, *bits);
        (0..64).filter(move |bit| bits & (1 << bit) != 0).map(move |bit| word * 64 + bit)
    };
    Ok(words.iter().flat_map(of_word).take(limit).map(|number| entry(format!("{what} {number}"), value)).collect())
}

fn backend_counters(tables: &Tables, limit: usize) -> Result<Vec<MapEntry>, MapError> {
    let counters = tables.backend_counters(1..tables.backends.capacity())?;
    let counted = counters.into_iter().filter(|(_, counter)| *counter != BackendCounter::default());
    let words = |(number, counter): (u32, BackendCounter)| {
        let BackendCounter { connections, packets, bytes, answers } = counter;
        entry(number, format!("{connections} connections {packets} packets {bytes} bytes {answers} answers"))
    };
    Ok(counted.take(limit).map(words).collect())
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
    for slot in tables.ruleset_ids()?.into_keys() {
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
    format!(
        "{} -> {} proto {}",
        place(tuple.src, tuple.sport.number()),
        place(tuple.dst, tuple.dport.number()),
        tuple.proto
    )
}

fn service_key(key: &ServiceKey) -> String {
    match (key.port.number(), key.proto) {
        (0, 0) => format!("{} all else", key.addr),
        (port, proto) => format!("{}/{}", place(key.addr, port), cirri_control::service::protocol_name(proto)),
    }
}

fn service(row: &Service) -> String {
    if row.flags & service_flag::REFUSE != 0 {
        return "refused".to_owned();
    }
    let set = |first: u32, count: u32| {
        if count == 0 { "nobody".to_owned() } else { format!("slots {first}-{}", first + count - 1) }
    };
    let algorithm = if row.algorithm == Algorithm::MAGLEV { "maglev" } else { "random" };
    let mut text = format!(
        "service {} inside {} outside {}, {algorithm}, {}, epoch slot {}",
        row.id,
        set(row.inside_first, row.inside_count),
        set(row.outside_first, row.outside_count),
        Forwarding::name(row.forwarding),
        row.slot,
    );
    if row.affinity != 0 {
        text.push_str(&format!(", affinity {} s", row.affinity));
    }
    if row.pool != 0 {
        text.push_str(&format!(", pool {}", row.pool));
    }
    for (flag, name) in [
        (service_flag::INSIDE_ONLY, "inside only"),
        (service_flag::RANGES, "source ranges"),
        (service_flag::RANGES_DENY, "denied"),
    ] {
        if row.flags & flag != 0 {
            text.push_str(&format!(", {name}"));
        }
    }
    text
}

fn backend(row: &Backend) -> String {
    let protocol = cirri_control::service::protocol_name(row.proto);
    let state = BackendState::name(row.state);
    format!("{}/{protocol} {state} of service {}", place(row.addr, row.port.number()), row.service)
}

fn affinity_key(key: &AffinityKey) -> String {
    if key.cookie == 0 {
        return format!("service {} client {}", key.service, key.client);
    }
    let [_, _, low, high] = key.client.words;
    let cookie = u64::from(high) << 32 | u64::from(low);
    format!("service {} client in network namespace {cookie}", key.service)
}

fn affinity(row: &Affinity) -> String {
    format!("backend {} used {} s ago", row.backend, age(row.last_used))
}

fn range(key: &RangeKey) -> String {
    let of_addr = IpcacheKey { prefix_len: key.prefix_len.saturating_sub(32), addr: key.addr };
    let net = ipcache_net(&of_addr).map_or_else(|| key.addr.to_string(), |net| net.to_string());
    format!("service {} {net}", key.service)
}

fn pool(row: &SnatPool) -> String {
    let first = u32::from(row.first.number());
    format!("{} {} ports {first}-{}", row.v4, row.v6, first + u32::from(row.mask))
}

/// Address and port.
fn place(addr: Addr, port: u16) -> String {
    if addr.is_v4() { format!("{addr}:{port}") } else { format!("[{addr}]:{port}") }
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

#[cfg(test)]
mod tests {
    use cirri_abi::Port;

    use super::*;

    #[test]
    fn rows_of_services_are_in_words() {
        let key = ServiceKey { addr: Addr::v4([10, 96, 0, 1]), port: Port::new(80), proto: 6, _pad: 0 };
        assert_eq!(service_key(&key), "10.96.0.1:80/TCP");
        assert_eq!(service_key(&ServiceKey { port: Port::new(0), proto: 0, ..key }), "10.96.0.1 all else");
        let row = Service {
            id: 3,
            flags: service_flag::INSIDE_ONLY,
            inside_first: 16,
            inside_count: 4,
            affinity: 10_800,
            slot: 20_484,
            ..Service::default()
        };
        assert_eq!(
            service(&row),
            "service 3 inside slots 16-19 outside nobody, random, snat, epoch slot 20484, affinity 10800 s, inside only"
        );
        let addr = Addr::v6([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
        let row =
            Backend { addr, port: Port::new(53), proto: 17, state: BackendState::DRAINING, service: 3, _pad: [0; 2] };
        assert_eq!(backend(&row), "[fd00::7]:53/UDP draining of service 3");
        let key = RangeKey { prefix_len: 32 + 96 + 24, service: 3, addr: Addr::v4([192, 0, 2, 0]) };
        assert_eq!(range(&key), "service 3 192.0.2.0/24");
    }
}
