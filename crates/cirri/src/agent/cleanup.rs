//! Removing everything that an instance made.

use cirri_loader::Datapath;
use cirri_loader::net::Net;

use super::ledger::{Found, Ledger};
use super::{devices, node, start};
use crate::config::Config;
use crate::exit::{Because, Failure, Result};
use crate::settings::Settings;

/// Removes devices, routes, programs, pins and state, and puts back settings. The agent must not be running.
/// What is gone already, the state directory included, is no error.
pub async fn cleanup(config: &Config) -> Result<()> {
    let state_dir = &config.state_dir.0;
    let _lock = start::lock(config)?;
    let (root, instance) = (&config.bpf.pin_root, &config.bpf.instance);
    let net = Net::here().because(Failure::Failed)?;
    let mut settings = Settings::of(&net, start::owner(config)).because(Failure::Failed)?;
    // The programs tell of devices whose files are lost. Asked first: it fails while the instance is in use.
    for device in Datapath::workload_devices(root, instance).because(Failure::Failed)? {
        net.delete_link(&device).await.because(Failure::Failed)?;
    }
    for Found { said, kept, .. } in Ledger::of(config).load_all().because(Failure::Failed)? {
        for endpoint in said.into_iter().chain(kept) {
            devices::delete(&net, &endpoint).await.because(Failure::Failed)?;
        }
    }
    if !settings.is_anothers(node::CLAIM).because(Failure::Failed)? {
        net.delete_link(node::OVERLAY).await.because(Failure::Failed)?;
        for route in net.routes().await.because(Failure::Failed)? {
            net.delete_route(&route).await.because(Failure::Failed)?;
        }
    }
    Datapath::purge(root, instance).because(Failure::Failed)?;
    for setting in settings.release().await.because(Failure::Failed)? {
        crate::output::progress(&format!("put back: {setting}"));
    }
    start::forget(config).because(Failure::Failed)?;
    crate::output::progress(&format!(
        "removed what instance {instance} made; its state was in {}",
        state_dir.display()
    ));
    Ok(())
}
