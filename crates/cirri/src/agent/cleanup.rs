//! Removing everything that an instance made.

use cirri_loader::Datapath;
use cirri_loader::net::Net;

use super::{devices, endpoint, node, start};
use crate::config::Config;
use crate::exit::{Because, Failure, Result};
use crate::files;

/// Removes devices, routes, programs, pins and state. The agent must not be running.
pub async fn cleanup(config: &Config) -> Result<()> {
    let _lock = start::lock(config)?;
    let net = Net::here().because(Failure::Failed)?;
    let state_dir = &config.state_dir.0;
    for endpoint in endpoint::load_all(state_dir).because(Failure::Failed)? {
        devices::delete(&net, &endpoint).await.because(Failure::Failed)?;
        endpoint.forget(state_dir).because(Failure::Failed)?;
    }
    net.delete_link(node::OVERLAY).await.because(Failure::Failed)?;
    for route in net.routes().await.because(Failure::Failed)? {
        net.delete_route(&route).await.because(Failure::Failed)?;
    }
    Datapath::purge(&config.bpf.pin_root, &config.bpf.instance).because(Failure::Failed)?;
    for file in ["store.redb", "agent.sock"] {
        files::remove(&state_dir.join(file)).because(Failure::Failed)?;
    }
    for deletion in crate::cni::pending_deletions(state_dir).because(Failure::Failed)? {
        files::remove(&deletion.path).because(Failure::Failed)?;
    }
    crate::output::progress(&format!(
        "removed what instance {} made; its state was in {}",
        config.bpf.instance,
        state_dir.display()
    ));
    Ok(())
}
