//! `cirri monitor`.

use crate::client::ClientArgs;
use crate::exit::{Because, Failure, Result};
use crate::output::{self, Format, OutputArgs};

/// Prints the packet path's events as they come, undecoded: numbers of identities, cookies,
/// devices, generations. For people who debug Cirri itself; `cirri observe` is for everyone else.
#[derive(Debug, clap::Args)]
pub struct MonitorArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs it.
pub fn run(client: &ClientArgs, args: &MonitorArgs) -> Result<()> {
    client.stream("monitor", serde_json::json!({}), |event: serde_json::Value| {
        let text = match args.output.output {
            Format::Table => line(&event),
            Format::Json => event.to_string() + "\n",
            Format::Yaml => format!("---\n{}", serde_saphyr::to_string(&event).because(Failure::Failed)?),
        };
        output::write_out(&text)
    })
}

fn line(event: &serde_json::Value) -> String {
    let mut text = String::new();
    for (name, value) in event.as_object().into_iter().flatten() {
        let value = value.as_str().map(str::to_owned).unwrap_or_else(|| value.to_string());
        text.push_str(&format!("{name}={value} "));
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}
