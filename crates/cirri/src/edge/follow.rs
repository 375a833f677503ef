//! The machine as its administrator changes it: routes, devices and addresses that come and go are followed, and what
//! the plan misses is named.

use std::sync::Arc;
use std::time::Duration;

use cirri_loader::net::{DeviceNews, ForeignRoutes};
use futures::FutureExt;

use super::core::Core;
use super::devices::{self, Machine, MachineError};
use super::plan::Plan;
use super::{Here, Shared, renew};
use crate::api::ProblemKind;

/// How long news are gathered: daemons change routes in bursts.
const BURST: Duration = Duration::from_millis(20);

/// Follows the machine, for ever.
pub async fn watch(shared: Arc<Shared>, mut routes: ForeignRoutes, mut devices: DeviceNews) {
    loop {
        let mut routed = tokio::select! {
            true = routes.changed() => true,
            true = devices.changed() => false,
            else => return tracing::error!("routes and devices are not watched any more"),
        };
        tokio::time::sleep(BURST).await;
        while routes.changed().now_or_never() == Some(true) {
            routed = true;
        }
        while devices.changed().now_or_never() == Some(true) {}
        let mut here = shared.machine.lock().await;
        let core = shared.core.lock().await;
        if routed {
            // Recipes hold the neighbour that a route led to: connections ask again for their way.
            renew(&core);
        }
        here.look(&core).await;
    }
}

impl Here {
    /// Looks at devices and addresses again. Devices that come back, also with another number, are served again.
    pub async fn look(&mut self, core: &Core) {
        let now = self.follow(core).await.err().map(|error| error.to_string());
        if let Some(error) = now.as_ref().filter(|error| self.trouble.as_ref() != Some(error)) {
            tracing::error!(error, "devices and addresses are not as the file wants them");
        }
        self.trouble = now;
    }

    /// What cannot be done keeps nothing else from it.
    async fn follow(&mut self, core: &Core) -> Result<(), MachineError> {
        let plan = &core.plan;
        let before = std::mem::replace(&mut self.machine, Machine::look(plan, &self.net).await?);
        self.name_flaws(plan);
        let Here { net, settings, datapath, machine, attached, .. } = self;
        let is_fresh = |(name, link): (&String, &Option<_>)| {
            let number = |link: &Option<cirri_loader::net::Link>| link.as_ref().map(|link| link.index);
            number(link).is_some_and(|now| before.devices.get(name).and_then(number) != Some(now))
        };
        let set = match machine.devices.iter().any(is_fresh) {
            // The settings of a device that was made anew are fresh, too.
            true => devices::apply_settings(plan, machine, net, settings),
            false => Ok(()),
        };
        let told = machine.tell(plan, &core.tables);
        let attached = attached.follow(plan, machine, datapath, settings);
        set?;
        told?;
        attached
    }

    /// Names what the plan misses on this machine, and nothing else of these kinds.
    pub fn name_flaws(&mut self, plan: &Plan) {
        let flaws = self.machine.flaws(plan, &self.stood);
        for kind in [ProblemKind::Device, ProblemKind::Address] {
            let of = flaws.iter().filter(|(what, ..)| *what == kind);
            self.drift.name(kind, of.map(|(_, object, finding)| (object.clone(), finding.clone())));
        }
    }
}
