//! `cirri observe`.

use cirri_flow::{Filter, Record};

use crate::api::Observe;
use crate::client::ClientArgs;
use crate::exit::{Because, Failure, Result};
use crate::output::{self, Format};

/// Prints connections that the packet path decided on: both ends by name, the verdict, why a packet
/// was dropped, and the rule that decided.
///
/// Filters of different kinds must all hold; several values of one filter are alternatives:
/// `--namespace shop --verdict dropped --port 80,443`. Established connections report nothing while
/// they go on.
#[derive(Debug, clap::Args)]
pub struct ObserveArgs {
    /// Go on with what comes
    #[arg(short, long)]
    follow: bool,
    /// Start with the newest N (all that are kept unless --follow)
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Namespace of either end
    #[arg(short, long, value_delimiter = ',', value_name = "NAMESPACE")]
    namespace: Vec<String>,
    /// Either end: POD or NAMESPACE/POD, a trailing * matches the rest
    #[arg(long, value_delimiter = ',', value_name = "POD")]
    pod: Vec<String>,
    /// The sender: a pod as above, an address or a prefix
    #[arg(long, value_delimiter = ',', value_name = "POD|PREFIX")]
    from: Vec<String>,
    /// The receiver
    #[arg(long, value_delimiter = ',', value_name = "POD|PREFIX")]
    to: Vec<String>,
    /// Address or prefix of either end
    #[arg(long, value_delimiter = ',', value_name = "PREFIX")]
    ip: Vec<String>,
    /// Port of either end
    #[arg(long, value_delimiter = ',', value_name = "PORT")]
    port: Vec<u16>,
    /// tcp, udp, sctp, icmp, icmpv6 or a number
    #[arg(long, value_delimiter = ',', value_name = "PROTOCOL")]
    protocol: Vec<String>,
    /// forwarded, dropped, audit, redirected
    #[arg(long, value_delimiter = ',', value_name = "VERDICT")]
    verdict: Vec<String>,
    /// Why it was dropped: a number or a name, as 133 or POLICY_DENIED
    #[arg(long, value_delimiter = ',', value_name = "REASON")]
    reason: Vec<String>,
    /// Identity of either end: a number or a reserved name, as world-ipv4
    #[arg(long, value_delimiter = ',', value_name = "IDENTITY")]
    identity: Vec<String>,
    /// The service: SERVICE or NAMESPACE/SERVICE, a trailing * matches the rest
    #[arg(long, value_delimiter = ',', value_name = "SERVICE")]
    service: Vec<String>,
    /// new, drop, renewed, close
    #[arg(long = "type", value_delimiter = ',', value_name = "TYPE")]
    kind: Vec<String>,
    /// How to print: a line per flow, JSON (one object per line), or YAML documents
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Runs it.
pub fn run(client: &ClientArgs, args: &ObserveArgs) -> Result<()> {
    let filter = Filter {
        namespace: args.namespace.clone(),
        pod: args.pod.clone(),
        from: args.from.clone(),
        to: args.to.clone(),
        ip: args.ip.clone(),
        port: args.port.clone(),
        protocol: args.protocol.clone(),
        verdict: args.verdict.clone(),
        reason: args.reason.clone(),
        identity: args.identity.clone(),
        service: args.service.clone(),
        kind: args.kind.clone(),
    };
    filter.check().because(Failure::BadInput)?;
    let observe = Observe { follow: args.follow, last: args.last, filter };
    let colours = output::colours();
    client.stream("observe", observe, |record: Record| print(&record, args.output, colours))
}

fn print(record: &Record, format: Format, colours: bool) -> Result<()> {
    let text = match format {
        Format::Table => cirri_flow::compact_with(record, colours) + "\n",
        Format::Json => serde_json::to_string(record).because(Failure::Failed)? + "\n",
        Format::Yaml => format!("---\n{}", serde_saphyr::to_string(record).because(Failure::Failed)?),
    };
    output::write_out(&text)
}
