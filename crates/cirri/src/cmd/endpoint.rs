//! `cirri endpoint`.

use std::net::IpAddr;

use crate::api::{EndpointGet, EndpointInfo};
use crate::client::ClientArgs;
use crate::exit::Result;
use crate::output::{self, OutputArgs, Table};

/// The workloads of this node.
#[derive(Debug, clap::Args)]
pub struct EndpointArgs {
    #[command(subcommand)]
    command: EndpointCommand,
}

#[derive(Debug, clap::Subcommand)]
enum EndpointCommand {
    /// All of them
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// One of them, with everything that is known
    Get {
        /// Its number, as `cirri endpoint list` shows it
        id: u16,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Runs it.
pub fn run(client: &ClientArgs, args: &EndpointArgs) -> Result<()> {
    match &args.command {
        EndpointCommand::List { output } => {
            let endpoints: Vec<EndpointInfo> = client.call("endpoint.list", serde_json::json!({}))?;
            output::print(output.output, &endpoints, |endpoints| list(endpoints))
        }
        EndpointCommand::Get { id, output } => {
            let endpoint: EndpointInfo = client.call("endpoint.get", EndpointGet { id: *id })?;
            output::print(output.output, &endpoint, one)
        }
    }
}

fn list(endpoints: &[EndpointInfo]) -> String {
    let mut table = Table::new(["id", "namespace", "pod", "identity", "addresses", "device", "rules", "state"]);
    for endpoint in endpoints {
        table.row([
            endpoint.id.to_string(),
            endpoint.namespace.clone(),
            endpoint.pod.clone(),
            endpoint.identity.to_string(),
            join(&endpoint.addresses),
            endpoint.host_ifname.clone(),
            endpoint.entries.to_string(),
            endpoint.state.clone(),
        ]);
    }
    table.render(output::terminal_width())
}

fn one(endpoint: &EndpointInfo) -> String {
    let rows = [
        ("Endpoint", endpoint.id.to_string()),
        ("Pod", format!("{}/{}", endpoint.namespace, endpoint.pod)),
        ("State", endpoint.state.clone()),
        ("Identity", endpoint.identity.to_string()),
        ("Labels", endpoint.labels.join("\n            ")),
        ("Addresses", join(&endpoint.addresses)),
        ("Device", format!("{} (index {}), {} inside", endpoint.host_ifname, endpoint.ifindex, endpoint.ifname)),
        ("MAC", endpoint.mac.clone()),
        ("Namespace", endpoint.netns.clone()),
        ("Container", endpoint.container_id.clone()),
        (
            "Rule set",
            format!("slot {}, {} entries, generation {}", endpoint.ruleset, endpoint.entries, endpoint.generation),
        ),
        ("Ready in", format!("{:.1} ms", endpoint.ready_ms)),
    ];
    rows.iter().map(|(name, value)| format!("{name:<12}{value}\n")).collect()
}

fn join(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
