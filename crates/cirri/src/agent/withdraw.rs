//! What a node that is cleaned up has in a store that it shares with others: its own keys go with it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use cirri_loader::net::Net;
use cirri_store::{Embedded, Etcd, EtcdOptions, STORE_ID, Store, StoreError};

use super::node;
use super::records::{self, NodeRecord};
use crate::config::{Config, StoreKind};
use crate::exit::{Because, Failure, Result};

/// Why nothing is removed.
#[derive(Debug, thiserror::Error)]
enum Kept {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the store is another one than this node was in")]
    Another,
    #[error("its record there is of a machine with the address {0}, which this one does not have")]
    OtherMachine(IpAddr),
    #[error("nothing here says that it is this node, as its state directory is lost or another node's")]
    Unknown,
}

/// Removes the keys of this node alone from a store of several nodes. What stays is said, and is no error: the machine is
/// to be clean without a store, too.
pub async fn withdraw(config: &Config, net: &Net) -> Result<()> {
    if config.store.kind != StoreKind::Etcd {
        return Ok(());
    }
    let name = node::name(config).because(Failure::BadInput)?;
    let addresses = node::addresses(net).await.because(Failure::Failed)?;
    let former = former(&config.state_dir.0.join("seen.redb"), &name).await;
    let etcd = &config.store.etcd;
    let options =
        EtcdOptions { lease_ttl: Duration::from_secs(etcd.lease_seconds), ..EtcdOptions::new(etcd.endpoints.clone()) };
    let store = Etcd::new(&options).because(Failure::BadInput)?;
    let line = match remove(&store, &name, &addresses, former.as_ref()).await {
        Ok(0) => return Ok(()),
        Ok(count) => format!("removed the {count} keys of node {name} from the store"),
        Err(why) => format!(
            "the keys of node {name} stay in the store: {why}. Its pod range stays taken: see `etcdctl get --prefix \
             {prefix}pools/`, and remove with `etcdctl del` what has the value {name}",
            prefix = cirri_store::PREFIX
        ),
    };
    crate::output::progress(&line);
    Ok(())
}

/// What the agent knew last.
struct Former {
    /// The id of its store.
    store: Vec<u8>,
    /// The address of the node with this name.
    v4: Option<IpAddr>,
}

async fn former(file: &Path, name: &str) -> Option<Former> {
    // It is made where it is not there.
    if !file.exists() {
        return None;
    }
    let saved = Embedded::open(file).await.ok()?;
    if let Some(aside) = saved.set_aside() {
        // It would have gone with the others.
        let _ = crate::files::remove(&aside.path);
    }
    let store = saved.get(STORE_ID).await.ok()??.value;
    let record = saved.get(&records::node_key(name)).await.ok()?;
    Some(Former { store, v4: record.and_then(|entry| address(&entry.value)) })
}

/// The address that the record of a node says.
fn address(record: &[u8]) -> Option<IpAddr> {
    serde_json::from_slice::<NodeRecord>(record).ok()?.v4.map(IpAddr::V4)
}

/// Removes what has this node's name, if it is sure that this is the node: by its record there, or, if that is gone, by
/// what it knew of itself and of this store. Answers how many keys there were.
async fn remove(
    store: &dyn Store,
    name: &str,
    addresses: &[IpAddr],
    former: Option<&Former>,
) -> std::result::Result<usize, Kept> {
    let now = store.health().await?.id;
    if former.is_some_and(|former| now.as_deref() != Some(former.store.as_slice())) {
        return Err(Kept::Another);
    }
    let mut keys = BTreeSet::new();
    for family in ["v4", "v6"] {
        let (entries, _) = store.list(&records::pool_prefix(family)).await?;
        keys.extend(entries.into_iter().filter(|entry| entry.value == name.as_bytes()).map(|entry| entry.key));
    }
    let prefix = records::ip_prefix(name);
    let (entries, _) = store.list(&prefix).await?;
    let of_address = |key: &String| key[prefix.len()..].parse::<IpAddr>().is_ok();
    keys.extend(entries.into_iter().map(|entry| entry.key).filter(of_address));
    // That it knows the store is no proof of its name.
    let mut is_ours = former.and_then(|former| former.v4).is_some_and(|v4| addresses.contains(&v4));
    for key in [records::node_key(name), records::enforced_key(name), records::caught_up_key(name)] {
        let Some(entry) = store.get(&key).await? else { continue };
        if let Some(v4) = address(&entry.value) {
            if !addresses.contains(&v4) {
                return Err(Kept::OtherMachine(v4));
            }
            is_ours = true;
        }
        keys.insert(key);
    }
    if !is_ours && !keys.is_empty() {
        return Err(Kept::Unknown);
    }
    // The ranges last: nobody takes one whose addresses are still somebody's.
    let (ranges, others): (Vec<&String>, Vec<&String>) =
        keys.iter().partition(|key| ["v4", "v6"].iter().any(|family| key.starts_with(&records::pool_prefix(family))));
    for key in others.into_iter().chain(ranges) {
        store.delete(key).await?;
    }
    Ok(keys.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_keys_of_a_node_go_with_it_and_no_others_and_only_if_it_is_sure_that_they_are_its() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(directory.path().join("store.redb")).await.unwrap();
        let node = |name: &str, last: u8| serde_json::json!({"name": name, "v4": format!("192.0.2.{last}"), "v6": null, "pod_v4": null, "pod_v6": null});
        let all = [
            (STORE_ID.to_owned(), "one".to_owned()),
            (records::node_key("a"), node("a", 1).to_string()),
            (records::node_key("ab"), node("ab", 2).to_string()),
            (records::enforced_key("a"), "{}".to_owned()),
            (format!("{}10.0.1.0/24", records::pool_prefix("v4")), "a".to_owned()),
            (format!("{}10.0.2.0/24", records::pool_prefix("v4")), "ab".to_owned()),
            (format!("{}fd00::/64", records::pool_prefix("v6")), "a".to_owned()),
            (format!("{}10.0.1.7", records::ip_prefix("a")), "{}".to_owned()),
            (format!("{}10.0.2.7", records::ip_prefix("ab")), "{}".to_owned()),
            (format!("{}10.0.2.7", records::ip_prefix("a/b")), "{}".to_owned()),
            (records::identity_key(300), "k8s:app=a".to_owned()),
        ];
        let keys = async || {
            let (entries, _) = store.list(cirri_store::PREFIX).await.unwrap();
            entries.into_iter().map(|entry| entry.key).collect::<BTreeSet<String>>()
        };
        for (key, value) in &all {
            store.put(key, value.as_bytes(), false).await.unwrap();
        }
        let before = keys().await;
        let here = [IpAddr::from([192, 0, 2, 1])];
        let other = [IpAddr::from([192, 0, 2, 9])];
        let knew = |store: &str, v4: Option<[u8; 4]>| Former { store: store.into(), v4: v4.map(IpAddr::from) };
        let refused = [
            (&here, Some(knew("two", Some([192, 0, 2, 1]))), "another one"),
            (&other, Some(knew("one", Some([192, 0, 2, 9]))), "192.0.2.1"),
            (&other, None, "192.0.2.1"),
        ];
        for (addresses, former, says) in refused {
            let why = remove(&store, "a", addresses, former.as_ref()).await.unwrap_err().to_string();
            assert!(why.contains(says), "{why}");
            assert_eq!(keys().await, before, "{why}");
        }
        // Nobody has renewed its record, and it lost its state.
        store.delete(&records::node_key("a")).await.unwrap();
        // Here was another node, or one of that name on another machine.
        for former in [None, Some(knew("one", None)), Some(knew("one", Some([192, 0, 2, 9])))] {
            assert!(matches!(remove(&store, "a", &here, former.as_ref()).await, Err(Kept::Unknown)));
        }
        assert_eq!(keys().await.len(), before.len() - 1);
        let before_again = keys().await;
        assert_eq!(remove(&store, "a", &here, Some(&knew("one", Some([192, 0, 2, 1])))).await.unwrap(), 4);
        for key in before_again.difference(&keys().await) {
            store.put(key, if key.contains("/pools/") { b"a" } else { b"{}" }, false).await.unwrap();
        }
        store.put(&records::node_key("a"), node("a", 1).to_string().as_bytes(), false).await.unwrap();

        assert_eq!(remove(&store, "a", &here, None).await.unwrap(), 5);
        let gone: BTreeSet<String> = before.difference(&keys().await).cloned().collect();
        let expected = [1, 3, 4, 6, 7].map(|number: usize| all[number].0.clone());
        assert_eq!(gone, BTreeSet::from(expected));
        assert_eq!(remove(&store, "a", &here, None).await.unwrap(), 0, "twice");
    }
}
