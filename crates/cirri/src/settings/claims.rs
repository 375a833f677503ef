//! What there can be one owner of in a network namespace, and what an owner notes for itself.

use std::collections::BTreeMap;

use super::{Settings, SettingsError};

impl Settings {
    /// Says that there can be no other owner of this kind of claim here.
    ///
    /// # Errors
    /// There is one.
    pub fn claim(&mut self, what: &str) -> Result<(), SettingsError> {
        let owner = self.owner.clone();
        self.change(|record| match record.claims.get(what) {
            Some(by) if *by != owner => Err(SettingsError::Claimed { by: by.clone() }),
            _ => {
                record.claims.insert(what.to_owned(), owner);
                Ok(())
            }
        })
    }

    /// The same; whether nobody else has it.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub fn try_claim(&mut self, what: &str) -> Result<bool, SettingsError> {
        match self.claim(what) {
            Err(SettingsError::Claimed { .. }) => Ok(false),
            claimed => claimed.map(|()| true),
        }
    }

    /// Gives up such claims of this owner.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn disclaim(&mut self, is_given_up: impl Fn(&str) -> bool) -> Result<(), SettingsError> {
        let owner = self.owner.clone();
        self.change(|record| {
            record.claims.retain(|what, by| *by != owner || !is_given_up(what));
            Ok(())
        })
    }

    /// All claims, and whose they are.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn claims(&self) -> Result<BTreeMap<String, String>, SettingsError> {
        Ok(self.read()?.claims)
    }
}
