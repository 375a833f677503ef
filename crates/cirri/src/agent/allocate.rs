//! Numbers and ranges that the whole cluster shares: taken by compare-and-swap, never assumed.

use std::collections::BTreeSet;

use cirri_abi::Identity;
use cirri_control::identity::{self, Identities};
use cirri_control::ipam::{ClusterPool, IpamError};
use cirri_control::labels::IdentityLabels;
use cirri_store::{Store, StoreError};
use ipnet::IpNet;

use super::records::{self, IdentityRecord};

/// Why nothing could be taken.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// The store did not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nothing is left.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// All identities are taken.
    #[error("all identities (256 to 65535) are taken; exclude labels that only name an instance")]
    NoIdentity,
    /// A record that was found makes no sense.
    #[error("the store's {key} cannot be read ({why}); remove it with `etcdctl del`")]
    Record {
        /// Its key.
        key: String,
        /// Why.
        why: String,
    },
}

/// The number of a set of labels: the one it has, or a new one. `known` only saves attempts.
///
/// # Errors
/// See [`AllocateError`].
pub async fn identity(
    store: &dyn Store,
    known: &Identities,
    labels: &IdentityLabels,
) -> Result<Identity, AllocateError> {
    let canonical = labels.canonical();
    let (mut taken_number, mut taken_hash) = (0, 0);
    loop {
        let key = records::labels_key(&identity::labels_key(labels, taken_hash));
        if let Some(entry) = store.get(&key).await? {
            let record: IdentityRecord = serde_json::from_slice(&entry.value)
                .map_err(|error| AllocateError::Record { key: key.clone(), why: error.to_string() })?;
            if record.labels == canonical {
                return Ok(Identity { id: record.id });
            }
            // Somebody made two sets of labels collide; each keeps a key of its own.
            taken_hash += 1;
            continue;
        }
        let proposed = known.propose(labels, taken_number).ok_or(AllocateError::NoIdentity)?;
        let record = IdentityRecord { id: proposed.id, labels: canonical.clone() };
        let record = serde_json::to_vec(&record)
            .map_err(|error| AllocateError::Record { key: key.clone(), why: error.to_string() })?;
        let by_number = records::identity_key(proposed.id);
        if store.create_all(&[(&by_number, canonical.as_bytes()), (&key, &record)]).await? {
            return Ok(proposed);
        }
        // Either somebody took the number, or the labels got theirs just now: look again.
        if store.get(&key).await?.is_none() {
            taken_number += 1;
        }
    }
}

/// The node's range of a pool: the one it has, or a new one.
///
/// # Errors
/// See [`AllocateError`].
pub async fn range(store: &dyn Store, pool: &ClusterPool, node: &str) -> Result<IpNet, AllocateError> {
    let family = if pool.cidr().addr().is_ipv4() { "v4" } else { "v6" };
    let prefix = records::pool_prefix(family);
    loop {
        let (entries, _) = store.list(&prefix).await?;
        let mut taken = BTreeSet::new();
        let mut own = None;
        for entry in &entries {
            let Ok(range) = entry.key[prefix.len()..].parse::<IpNet>() else { continue };
            if entry.value == node.as_bytes() && pool.owns(range) {
                own = own.or(Some(range));
            }
            taken.insert(range);
        }
        if let Some(own) = own {
            return Ok(own);
        }
        let proposed = pool.propose(node, &taken)?;
        if store.create(&format!("{prefix}{proposed}"), node.as_bytes(), false).await? {
            return Ok(proposed);
        }
    }
}
