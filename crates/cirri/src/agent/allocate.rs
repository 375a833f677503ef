//! Numbers and ranges that the whole cluster shares: taken by compare-and-swap, never assumed.

use std::collections::{BTreeMap, BTreeSet};

use cirri_abi::Identity;
use cirri_control::cut::cut;
use cirri_control::identity::{self, Identities};
use cirri_control::ipam::{ClusterPool, IpamError};
use cirri_control::labels::IdentityLabels;
use cirri_store::{Store, StoreError};
use ipnet::IpNet;

use super::records::{self, IdentityRecord, NodeRecord};

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
                return confirmed(store, key, &record).await;
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

/// The number that a record gives to its labels, once the record of the number says the same: a workload must
/// not get the identity of others, whoever wrote it there.
async fn confirmed(store: &dyn Store, key: String, record: &IdentityRecord) -> Result<Identity, AllocateError> {
    let identity = Identity { id: record.id };
    record.check().map_err(|why| AllocateError::Record { key: key.clone(), why })?;
    let by_number = records::identity_key(record.id);
    // Of a pair of which one is gone the other still holds.
    if store.create(&by_number, record.labels.as_bytes(), false).await? {
        return Ok(identity);
    }
    let Some(entry) = store.get(&by_number).await? else { return Ok(identity) };
    match line_of(&entry.value) {
        Some(line) if line == record.labels => Ok(identity),
        Some(line) => {
            let why = format!("identity {} is that of `{}`", record.id, cut(line));
            Err(AllocateError::Record { key, why })
        }
        None => {
            store.put(&by_number, record.labels.as_bytes(), false).await?;
            Ok(identity)
        }
    }
}

/// The line of labels that a value is, if it is one.
fn line_of(value: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(value).ok().filter(|line| !line.is_empty())?;
    IdentityLabels::parse(line).is_ok_and(|labels| labels.canonical() == line).then_some(line)
}

/// The node's range of a pool: the one it has, or a new one. What is `known` of nodes may be of a store that this one
/// replaced: the node's range there stays its own, and those of others stay theirs.
///
/// # Errors
/// See [`AllocateError`].
pub async fn range(
    store: &dyn Store,
    pool: &ClusterPool,
    node: &str,
    known: &BTreeMap<String, NodeRecord>,
) -> Result<IpNet, AllocateError> {
    let is_v4 = pool.cidr().addr().is_ipv4();
    let prefix = records::pool_prefix(if is_v4 { "v4" } else { "v6" });
    let of = |record: &NodeRecord| if is_v4 { record.pod_v4.map(IpNet::V4) } else { record.pod_v6.map(IpNet::V6) };
    let former = known.get(node).and_then(of).filter(|range| pool.owns(*range));
    let others = known.iter().filter(|(name, _)| *name != node).filter_map(|(_, record)| of(record));
    let others: BTreeSet<IpNet> = others.collect();
    loop {
        let (entries, _) = store.list(&prefix).await?;
        let mut taken = others.clone();
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
        let proposed = match former.filter(|range| !taken.contains(range)) {
            Some(range) => range,
            None => pool.propose(node, &taken)?,
        };
        if store.create(&format!("{prefix}{proposed}"), node.as_bytes(), false).await? {
            return Ok(proposed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cirri_store::Embedded;

    async fn store(name: &str) -> (std::path::PathBuf, Embedded) {
        let dir = std::env::temp_dir().join(format!("cirri-allocate-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let store = Embedded::open(dir.join("store.redb")).await.unwrap();
        (dir, store)
    }

    fn labels(app: &str) -> IdentityLabels {
        IdentityLabels::parse(&format!("k8s:app={app}")).unwrap()
    }

    #[tokio::test]
    async fn the_same_labels_get_the_same_number_and_others_another_even_if_nobody_knows_of_them() {
        let (dir, store) = store("identity").await;
        let nothing = Identities::new();
        let first = identity(&store, &nothing, &labels("a")).await.unwrap();
        assert_eq!(identity(&store, &nothing, &labels("a")).await.unwrap(), first);
        // Somebody else holds the number that these labels would try first.
        let wanted = nothing.propose(&labels("b"), 0).unwrap();
        assert!(store.create(&records::identity_key(wanted.id), b"k8s:app=c", false).await.unwrap());
        let second = identity(&store, &nothing, &labels("b")).await.unwrap();
        assert!(second != wanted && second != first);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn labels_that_collide_in_their_hash_keep_apart() {
        let (dir, store) = store("collision").await;
        let key = records::labels_key(&identity::labels_key(&labels("a"), 0));
        let forged = serde_json::to_vec(&IdentityRecord { id: 300, labels: "k8s:app=forged".into() }).unwrap();
        store.put(&key, &forged, false).await.unwrap();
        let number = identity(&store, &Identities::new(), &labels("a")).await.unwrap();
        assert_ne!(number.id, 300);
        assert_eq!(identity(&store, &Identities::new(), &labels("a")).await.unwrap(), number);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn a_record_of_labels_alone_gives_nobody_the_identity_of_others() {
        let (dir, store) = store("forged").await;
        let known = Identities::new();
        let key = records::labels_key(&identity::labels_key(&labels("a"), 0));
        let by_number = |id| records::identity_key(id);
        let says = async |id: u32| {
            let record = IdentityRecord { id, labels: "k8s:app=a".into() };
            store.put(&key, &serde_json::to_vec(&record).unwrap(), false).await.unwrap();
            identity(&store, &known, &labels("a")).await
        };
        store.put(&by_number(300), b"k8s:app=b", false).await.unwrap();
        for others in [0, 1, Identity::WORLD.id, Identity::MIN_ALLOCATED - 1, 70_000, 300] {
            let outcome = says(others).await;
            let told = |error: &AllocateError| matches!(error, AllocateError::Record { key: of, .. } if *of == key);
            assert!(outcome.as_ref().is_err_and(told), "{others}: {outcome:?}");
        }
        // One of a pair is gone or spoilt: the other one holds, and both are there again.
        assert_eq!(says(301).await.unwrap().id, 301);
        store.put(&by_number(302), b"{", false).await.unwrap();
        assert_eq!(says(302).await.unwrap().id, 302);
        for id in [301, 302] {
            assert_eq!(store.get(&by_number(id)).await.unwrap().unwrap().value, b"k8s:app=a");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn a_node_keeps_its_range_and_nodes_never_share_one() {
        let (dir, store) = store("range").await;
        let pool = ClusterPool::new("10.244.0.0/22".parse().unwrap(), 24).unwrap();
        let (mut ranges, nothing) = (BTreeSet::new(), BTreeMap::new());
        for node in ["a", "b", "c", "d"] {
            let got = range(&store, &pool, node, &nothing).await.unwrap();
            assert!(ranges.insert(got), "{node} got {got} a second time");
            assert_eq!(range(&store, &pool, node, &nothing).await.unwrap(), got);
        }
        assert!(matches!(range(&store, &pool, "e", &nothing).await, Err(AllocateError::Ipam(_))));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn over_a_store_that_lost_its_data_every_node_keeps_its_range_whoever_asks_first() {
        let (dir, store) = store("emptied").await;
        let pool = ClusterPool::new("10.244.0.0/22".parse().unwrap(), 24).unwrap();
        // The nodes have each other's places: what its name says is another's.
        let place = |node: &str| pool.propose(node, &BTreeSet::new()).unwrap();
        let (first, second) = ("a", ["b", "c", "d", "e"].into_iter().find(|node| place(node) != place("a")).unwrap());
        let record = |node: &str, range: IpNet| {
            let IpNet::V4(range) = range else { panic!("{range}") };
            let record = NodeRecord { name: node.to_owned(), v4: None, v6: None, pod_v4: Some(range), pod_v6: None };
            (node.to_owned(), record)
        };
        let known = BTreeMap::from([record(first, place(second)), record(second, place(first))]);
        assert_eq!(range(&store, &pool, first, &known).await.unwrap(), place(second));
        // One that is new takes nobody's, and who comes later still has its own.
        let new = range(&store, &pool, "new", &known).await.unwrap();
        assert!(new != place(first) && new != place(second));
        assert_eq!(range(&store, &pool, second, &known).await.unwrap(), place(first));
        // What the store says comes first.
        let known = BTreeMap::from([record(first, new)]);
        assert_eq!(range(&store, &pool, first, &known).await.unwrap(), place(second));
        let known = BTreeMap::from([record("late", new)]);
        let late = range(&store, &pool, "late", &known).await.unwrap();
        assert!(![place(first), place(second), new].contains(&late));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
