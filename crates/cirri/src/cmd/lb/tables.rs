//! What `cirri lb` prints for people.

use std::fmt::Write as _;

use crate::edge::api::{PoolStatus, ServiceInfo, Stats, Status, Traffic};
use crate::output::{self, Table};

/// `cirri lb status`.
pub fn status(status: &Status) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<12}{value}");
    };
    line("Instance", format!("{} (pid {}, {})", status.instance, status.pid, status.version));
    line("Up", format!("{} s, {} MiB", status.uptime_s, status.memory_bytes / (1 << 20)));
    let config = &status.config;
    let state = if config.in_force { "in force" } else { "NOT IN FORCE, its last good version is" };
    line("File", format!("{}: {state} (read {} s ago, {} times)", config.file, config.age_s, config.loads));
    let addresses: Vec<String> = status.addresses.iter().map(ToString::to_string).collect();
    line("Sources", addresses.join(", "));
    for device in &status.devices {
        let why = if device.reason.is_empty() { String::new() } else { format!(" ({})", device.reason) };
        line("Device", format!("{}: {}{why}", device.name, device.mode));
    }
    let backends: Vec<String> = status.backends.iter().map(|(state, count)| format!("{count} {state}")).collect();
    line("Services", status.services.to_string());
    line("Backends", backends.join(", "));
    for name in &status.refusing {
        line("REFUSING", format!("{name}: nobody serves it, connections are refused"));
    }
    for warning in &status.warnings {
        line("WARNING", warning.clone());
    }
    for problem in &status.problems {
        line("PROBLEM", problem.to_string());
    }
    if !status.repaired.is_empty() {
        let each: Vec<String> = status.repaired.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        line("Repaired", each.join(", "));
    }
    let width = output::terminal_width();
    let mut section = |table: Table| {
        out.push('\n');
        out.push_str(&table.render(width));
    };
    if !status.health.is_empty() {
        let mut table = Table::new(["service", "backend", "check", "state", "since", "changes", "last"]);
        for health in &status.health {
            table.row([
                health.service.clone(),
                health.backend.clone(),
                health.check.clone(),
                health.state.clone(),
                format!("{} s", health.since_s),
                health.changes.to_string(),
                health.last.clone(),
            ]);
        }
        section(table);
    }
    if !status.pools.is_empty() {
        section(pool_table(&status.pools));
    }
    if !status.drops.is_empty() {
        let mut table = Table::new(["dropped", "packets", "clients (drops, to)"]);
        for drops in &status.drops {
            let clients: Vec<String> = drops
                .clients
                .iter()
                .take(3)
                .map(|client| format!("{} ({}, {})", client.address, client.drops, client.destination))
                .collect();
            table.row([format!("{} ({})", drops.text, drops.reason), drops.packets.to_string(), clients.join(" ")]);
        }
        section(table);
    }
    let mut table = Table::new(["table", "used", "of"]);
    for one in &status.tables {
        table.row([one.name.clone(), one.used.to_string(), one.size.to_string()]);
    }
    section(table);
    let mut table = Table::new(["counter", "packets", "bytes"]);
    for (name, counter) in status.counters.iter().filter(|(_, counter)| counter.packets > 0) {
        table.row([name.clone(), counter.packets.to_string(), counter.bytes.to_string()]);
    }
    section(table);
    out
}

/// `cirri lb list`.
pub fn list(services: &[ServiceInfo]) -> String {
    let mut table = Table::new(["service", "frontend", "how", "backend", "address", "weight", "share", "state"]);
    for service in services {
        let frontend = std::net::SocketAddr::new(service.address, service.port);
        let mut how = format!("{} {}", service.algorithm, service.forwarding);
        if service.affinity_s > 0 {
            let _ = write!(how, " affinity {} s", service.affinity_s);
        }
        if !service.pool.is_empty() {
            let _ = write!(how, " pool {}", service.pool);
        }
        let mut first = [service.name.clone(), format!("{frontend}/{}", service.protocol), how];
        if service.backends.is_empty() {
            let [name, frontend, how] = first;
            table.row([name, frontend, how, "-".into(), "-".into(), "-".into(), "-".into(), service.state.clone()]);
            continue;
        }
        for backend in &service.backends {
            let [name, frontend, how] = std::mem::take(&mut first);
            let address = std::net::SocketAddr::new(backend.address, backend.port).to_string();
            let state = match backend.reason.as_str() {
                "" => backend.state.clone(),
                reason => format!("{} ({reason})", backend.state),
            };
            let name_of_backend = if backend.name == address { "-".to_owned() } else { backend.name.clone() };
            table.row([
                name,
                frontend,
                how,
                name_of_backend,
                address,
                backend.weight.to_string(),
                format!("{:.1} %", backend.share * 100.0),
                state,
            ]);
        }
    }
    table.render(output::terminal_width())
}

/// `cirri lb stats`.
pub fn stats(stats: &Stats) -> String {
    let mut table = Table::new([
        "service",
        "backend",
        "connections",
        "packets",
        "bytes",
        "answers",
        "conn/s",
        "packets/s",
        "bytes/s",
    ]);
    let mut row = |service: String, backend: String, it: &Traffic| {
        let rate = |of: fn(&crate::edge::api::Rates) -> f64| {
            it.rates.as_ref().map_or_else(|| "-".to_owned(), |rates| format!("{:.1}", of(rates)))
        };
        table.row([
            service,
            backend,
            it.connections.to_string(),
            it.packets.to_string(),
            it.bytes.to_string(),
            it.answers.to_string(),
            rate(|rates| rates.connections),
            rate(|rates| rates.packets),
            rate(|rates| rates.bytes),
        ]);
    };
    for service in &stats.services {
        row(format!("{} ({})", service.name, service.frontend), "all".to_owned(), &service.total);
        for backend in &service.backends {
            row(String::new(), backend.name.clone(), &backend.total);
        }
    }
    table.render(output::terminal_width())
}

/// `cirri lb pools`.
pub fn pools(pools: &[PoolStatus]) -> String {
    pool_table(pools).render(output::terminal_width())
}

fn pool_table(pools: &[PoolStatus]) -> Table {
    let mut table = Table::new(["pool", "addresses", "ports", "in use", "connections", "clients (connections)"]);
    for pool in pools {
        let addresses: Vec<String> = pool.addresses.iter().map(ToString::to_string).collect();
        let clients: Vec<String> =
            pool.clients.iter().map(|client| format!("{} ({})", client.address, client.connections)).collect();
        table.row([
            pool.name.clone(),
            addresses.join(","),
            pool.ports.clone(),
            format!("{} of {}", pool.used, pool.size),
            pool.connections.to_string(),
            clients.join(" "),
        ]);
    }
    table
}
