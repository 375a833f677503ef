//! Removing everything that an instance made.

use cirri_loader::Datapath;
use cirri_loader::net::{Namespace, Net};

use super::endpoint::Endpoint;
use super::ledger::{Found, Ledger};
use super::{devices, inside, node, start, withdraw};
use crate::config::Config;
use crate::exit::{Because, Failure, Result};
use crate::settings::Settings;

/// Removes devices, routes, programs, pins, state and the node's keys in the store, and puts back settings. The agent must not be running.
/// What is gone already, the state directory included, is no error.
pub async fn cleanup(config: &Config) -> Result<()> {
    let lock = start::lock(config)?;
    let removed = remove(config).await;
    if removed.is_err() {
        lock.give_up(config);
    }
    removed
}

async fn remove(config: &Config) -> Result<()> {
    let state_dir = &config.state_dir.0;
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
            // A container that lives on keeps what does not go with its device.
            if let Some(container) = container(&endpoint)
                && let Err(error) = inside::clear(&endpoint, container).await
            {
                crate::output::progress(&format!("rules stay in {}: {error}", endpoint.netns));
            }
        }
    }
    // Not asked for alone: who claims it in between would lose what there is one of.
    if settings.try_claim(node::CLAIM).because(Failure::Failed)? {
        net.delete_link(node::OVERLAY).await.because(Failure::Failed)?;
        for found in net.routes().await.because(Failure::Failed)? {
            net.delete_route(&found.route).await.because(Failure::Failed)?;
        }
        withdraw::withdraw(config, &net).await?;
        for said in settings.put_routes_back().await.because(Failure::Failed)? {
            crate::output::progress(&said);
        }
    }
    Datapath::purge(root, instance).because(Failure::Failed)?;
    for setting in settings.release().await.because(Failure::Failed)? {
        crate::output::progress(&format!("put back: {setting}"));
    }
    start::forget(config).because(Failure::Failed)?;
    settings.remove_directories(None).because(Failure::Failed)?;
    crate::output::progress(&format!(
        "removed what instance {instance} made; its state was in {}",
        state_dir.display()
    ));
    Ok(())
}

/// The namespace that a workload was attached to, if it is still there.
fn container(endpoint: &Endpoint) -> Option<Namespace> {
    let namespace = Namespace::open(&endpoint.netns).ok()?;
    namespace.cookie().is_ok_and(|cookie| cookie == endpoint.netns_cookie).then_some(namespace)
}
