//! The node's agent.

mod endpoint;
mod records;
mod slots;
mod table;
mod view;

use crate::config::{Config, Loaded};
use crate::exit::{Error, Failure, Result};

/// Runs the agent until it is told to stop.
pub async fn run(loaded: Loaded) -> Result<()> {
    Err(Error::new(Failure::Failed, format!("{:?}", loaded.config)))
}

/// Removes what the instance made.
pub async fn cleanup(config: &Config) -> Result<()> {
    Err(Error::new(Failure::Failed, format!("{config:?}")))
}
