//! What a kubelet would say of a pod: its addresses, and that it is ready.

use serde_json::{Value, json};

use cirri_control::resource::Resource;

use super::state::PodRecord;

/// The manifest of a pod that does not run yet: nobody is to send it anything.
pub fn pending(manifest: &str) -> String {
    with_status(manifest, |status| {
        if status["phase"].is_null() {
            status["phase"] = "Pending".into();
        }
        ready(status, "False");
    })
}

/// The pod's manifest with what was observed of it. What the manifest says itself of readiness stands: that is how a
/// pod is made unready in a lab.
pub fn observed(manifest: &str, pod: &PodRecord) -> String {
    with_status(manifest, |status| {
        if status["podIPs"].as_array().is_none_or(Vec::is_empty) {
            let addresses: Vec<Value> = pod.addresses.iter().map(|address| json!({"ip": address})).collect();
            status["podIPs"] = addresses.into();
        }
        if status["phase"].is_null() {
            status["phase"] = "Running".into();
        }
        ready(status, "True");
    })
}

fn with_status(manifest: &str, change: impl FnOnce(&mut Value)) -> String {
    // What is in the store or about to be was read as a resource before.
    let Ok(mut document) = serde_json::from_str::<Value>(manifest) else { return manifest.to_owned() };
    change(&mut document["status"]);
    Resource::from_json(&document.to_string()).map_or_else(|_| manifest.to_owned(), |resource| resource.to_json())
}

/// Says whether the pod is ready, unless its manifest does.
fn ready(status: &mut Value, ready: &str) {
    let mut conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    if !conditions.iter().any(|condition| condition["type"] == "Ready") {
        conditions.push(json!({"type": "Ready", "status": ready}));
        status["conditions"] = conditions.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(status: &str) -> Value {
        let manifest = format!(
            r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"a"}},"spec":{{"containers":[{{"name":"c"}}]}}{status}}}"#
        );
        let pod = PodRecord {
            key: "default/a".parse().unwrap(),
            node: "node1".into(),
            netns: "/run/netns/x".into(),
            container_id: "x".into(),
            addresses: vec!["10.244.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            spec: super::super::state::PodSpec::default(),
            complete: true,
            error: None,
        };
        serde_json::from_str(&observed(&manifest, &pod)).unwrap()
    }

    #[test]
    fn a_pod_that_runs_has_addresses_and_is_ready_unless_its_manifest_says_no() {
        let pod = told("");
        assert_eq!(pod["status"]["podIPs"], json!([{"ip": "10.244.0.2"}, {"ip": "fd00::2"}]));
        assert_eq!(pod["status"]["conditions"][0]["status"], "True");
        let waiting =
            pending(r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"},"spec":{"containers":[{"name":"c"}]}}"#);
        assert!(waiting.contains(r#""status":"False""#), "{waiting}");
        let pod = told(r#","status":{"conditions":[{"type":"Ready","status":"False"}]}"#);
        assert_eq!(pod["status"]["conditions"][0]["status"], "False");
        assert_eq!(pod["status"]["podIPs"][0]["ip"], "10.244.0.2");
    }
}
