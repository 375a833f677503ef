//! Routes of others that one of ours takes the place of.

use cirri_loader::net::ForeignRoute;
use ipnet::IpNet;

use super::record::Replaced;
use super::{Settings, SettingsError};

impl Settings {
    /// A route of this owner's is to take the place of somebody else's. Of several, one after the other, the last is
    /// what would stand there without Cirri.
    ///
    /// # Errors
    /// It cannot be recorded.
    pub fn replace_route(&mut self, network: IpNet, foreign: &ForeignRoute) -> Result<(), SettingsError> {
        let replaced = Replaced { message: foreign.to_bytes(), owner: self.owner.clone() };
        self.change(|record| {
            record.routes.insert(network.to_string(), replaced);
            Ok(())
        })
    }

    /// The route of this owner's to a network is gone: the one that it took the place of is put back, unless somebody
    /// has put another there. Answers it if it was.
    ///
    /// # Errors
    /// The kernel refuses it, and it is forgotten: its device may be gone. Or the record cannot be written.
    pub async fn put_route_back(&mut self, network: IpNet) -> Result<Option<ForeignRoute>, SettingsError> {
        let Some(replaced) = self.kept.routes.get(&network.to_string()) else { return Ok(None) };
        let foreign = ForeignRoute::from_bytes(&replaced.message);
        let put = match &foreign {
            Some(foreign) => self.net.put_back(foreign).await,
            None => Ok(false),
        };
        let owner = self.owner.clone();
        self.change(|record| {
            record.routes.retain(|of, replaced| *of != network.to_string() || replaced.owner != owner);
            Ok(())
        })?;
        let is_back = put?;
        Ok(foreign.filter(|_| is_back))
    }

    /// Puts back all of them, as [`Settings::put_route_back`] does one. Answers what is to be said of each.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub async fn put_routes_back(&mut self) -> Result<Vec<String>, SettingsError> {
        self.kept = self.read()?.of(&self.owner);
        let networks: Vec<IpNet> = self.kept.routes.keys().filter_map(|network| network.parse().ok()).collect();
        let mut said = Vec::new();
        for network in networks {
            match self.put_route_back(network).await {
                Ok(Some(foreign)) => said.push(format!("put back: {foreign}")),
                Ok(None) => said.push(format!("somebody else's route to {network} stays")),
                Err(SettingsError::Net(error)) => said.push(format!("a route that was there before is lost: {error}")),
                Err(error) => return Err(error),
            }
        }
        Ok(said)
    }
}
