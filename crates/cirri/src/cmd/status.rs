//! `cirri status`.

use std::fmt::Write as _;

use crate::api::{HealthCheckInfo, LatencyInfo, ServicesStatus, Status, StoreStatus};
use crate::client::ClientArgs;
use crate::exit::{Error, Failure, Result};
use crate::output::{self, OutputArgs, Table};

/// Prints how the agent is doing: what is not well, the store, what is enforced, the other nodes, drops
/// by reason. With `--check` it exits 1 unless everything is well.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Exit 1 if there is any problem, and name them
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs it.
pub fn run(client: &ClientArgs, args: &StatusArgs) -> Result<()> {
    let status: Status = client.call("status", serde_json::json!({}))?;
    output::print(args.output.output, &status, table)?;
    if args.check && !status.problems.is_empty() {
        let names: Vec<String> =
            status.problems.iter().map(|problem| format!("{} {}", problem.what, problem.object)).collect();
        return Err(Error::new(Failure::Failed, format!("not everything is well: {}", names.join(", "))));
    }
    Ok(())
}

fn table(status: &Status) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<12}{value}");
    };
    line("Node", format!("{} (instance {}, pid {}, {})", status.node, status.instance, status.pid, status.version));
    line("Up", format!("{} s, {} MiB", status.uptime_s, status.memory_bytes / (1 << 20)));
    let addresses: Vec<String> = status.addresses.iter().map(ToString::to_string).collect();
    line("Addresses", addresses.join(", "));
    line("Pods", format!("{} (routing: {})", status.pod_cidrs.join(", "), status.routing));
    if !status.without_v6.is_empty() {
        line("IPv4 alone", status.without_v6.clone());
    }
    let store = match (status.store.healthy, status.store.synced) {
        (true, true) => "ok".to_owned(),
        (true, false) => "not seen whole yet; running on what was pinned".to_owned(),
        (false, _) => {
            let StoreStatus { since, error, .. } = &status.store;
            format!("NOT REACHABLE since {since}, last good state is in force: {error}")
        }
    };
    line("Store", format!("{}: {store}", status.store.kind));
    let more = if status.is_behind { ", MORE TO COME" } else { "" };
    line("Revision", format!("{} enforced, {} seen{more}", status.enforced_revision, status.seen_revision));
    let LatencyInfo { count, p50_us, p99_us, max_us, .. } = status.latency;
    let ms = |us: u64| format!("{:.1} ms", us as f64 / 1000.0);
    line("In force", format!("after {} (p50), {} (p99), {} (longest of {count})", ms(p50_us), ms(p99_us), ms(max_us)));
    line("Endpoints", status.endpoints.to_string());
    line(
        "Flows",
        format!(
            "{} of {} kept, {} seen, {} lost",
            status.flows.kept, status.flows.capacity, status.flows.seen, status.flows.lost
        ),
    );
    for attachment in &status.attachments {
        line("Attached", attachment.clone());
    }
    for (name, value) in services(&status.services) {
        line(name, value);
    }
    if !status.repaired.is_empty() {
        let each: Vec<String> = status.repaired.iter().map(|(what, count)| format!("{count} {what}")).collect();
        line("Repaired", each.join(", "));
    }
    for problem in &status.problems {
        line("PROBLEM", problem.to_string());
    }

    let width = output::terminal_width();
    let mut tables = Table::new(["table", "done", "pending", "error"]);
    for table in &status.tables {
        tables.row([
            table.name.clone(),
            table.done.to_string(),
            table.pending.to_string(),
            table.errors.len().to_string(),
        ]);
    }
    out.push('\n');
    out.push_str(&tables.render(width));
    for table in &status.tables {
        for row in &table.errors {
            let _ = writeln!(out, "  {} {}: {} (tried {} times)", table.name, row.key, row.error, row.attempts);
        }
    }
    if !status.peers.is_empty() {
        let mut peers = Table::new(["peer", "addresses", "pod ranges", "workloads"]);
        for peer in &status.peers {
            let addresses: Vec<String> = peer.addresses.iter().map(ToString::to_string).collect();
            peers.row([peer.name.clone(), addresses.join(","), peer.pod_cidrs.join(","), peer.workloads.to_string()]);
        }
        out.push('\n');
        out.push_str(&peers.render(width));
    }
    let mut counters = Table::new(["counter", "packets", "bytes"]);
    for (name, counter) in status.counters.iter().filter(|(_, counter)| counter.packets > 0) {
        counters.row([name.clone(), counter.packets.to_string(), counter.bytes.to_string()]);
    }
    out.push('\n');
    out.push_str(&counters.render(width));
    out
}

fn services(status: &ServicesStatus) -> Vec<(&'static str, String)> {
    let ServicesStatus { services, ports, frontends, ready, backends, socket, .. } = status;
    let mut lines = vec![(
        "Services",
        format!("{services} with {ports} ports at {frontends} addresses, {ready} of {backends} backends ready"),
    )];
    lines.push((
        "Sockets",
        match (socket.on, socket.error.is_empty()) {
            (true, _) => format!(
                "translated ({}) in {}; {} workloads packet by packet",
                socket.mode, socket.cgroup, socket.per_packet
            ),
            (false, true) => "translated nowhere (services.socket.mode off)".to_owned(),
            (false, false) => format!("NOT translated: {}", socket.error),
        },
    ));
    lines.extend(
        status.devices.iter().map(|edge| ("Edge", format!("{}: {} ({})", edge.device, edge.mode, edge.reason))),
    );
    for check in &status.health_checks {
        let HealthCheckInfo { port, service, local, error } = check;
        let state = if error.is_empty() { format!("{local} local backends") } else { format!("NOT answered: {error}") };
        lines.push(("Health", format!("port {port} for {service}: {state}")));
    }
    lines
}
