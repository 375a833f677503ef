//! `cirri config`.

use std::path::PathBuf;

use crate::config;
use crate::exit::{Because, Failure, Result};
use crate::output::{self, OutputArgs, Table};

/// Prints every value of the configuration and where it came from: `default`, `file`, `env` or
/// `flag`. Nothing is started and nobody is asked; what it prints is what `cirri agent` with the
/// same options would run with.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    #[command(flatten)]
    source: ConfigSource,
    #[command(flatten)]
    output: OutputArgs,
}

/// Where a configuration is read from.
#[derive(Debug, clap::Args)]
pub struct ConfigSource {
    /// The configuration file (YAML)
    #[arg(short, long, env = "CIRRI_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set one value, as `--set routing.mode=direct`; stronger than file and environment
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl ConfigSource {
    /// Reads it.
    pub fn load(&self) -> Result<config::Loaded> {
        config::load(self.config.as_deref(), |name| std::env::var(name).ok(), &self.set).because(Failure::BadInput)
    }
}

/// Runs it.
pub fn run(args: &ConfigArgs) -> Result<()> {
    let loaded = args.source.load()?;
    output::print(args.output.output, &loaded.values, |values| {
        let mut table = Table::new(["key", "value", "source"]);
        for value in values {
            let text = match &value.value {
                serde_json::Value::String(text) => text.clone(),
                serde_json::Value::Null => "-".to_owned(),
                other => other.to_string(),
            };
            table.row([value.key.clone(), text, value.source.clone()]);
        }
        table.render(output::terminal_width())
    })
}
