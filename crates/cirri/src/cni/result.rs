//! What ADD answers, and whether an earlier answer still holds.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::spec::VERSIONS;
use crate::api::EndpointAdded;

/// The answer to ADD.
pub fn added(version: &str, ifname: &str, netns: &str, added: &EndpointAdded) -> Value {
    // Before 1.0.0 an address had to say its family; since then it must not.
    let with_family = version.starts_with("0.");
    let mut ips = Vec::new();
    let mut routes = Vec::new();
    for address in &added.addresses {
        let (gateway, is_default, everything, family) = match address.ip {
            IpAddr::V4(_) => (added.gateway_v4, added.default_v4, "0.0.0.0/0", "4"),
            IpAddr::V6(_) => (added.gateway_v6, added.default_v6, "::/0", "6"),
        };
        let mut ip = json!({ "interface": 1, "address": format!("{}/{}", address.ip, address.prefix) });
        if let Some(gateway) = gateway {
            ip["gateway"] = json!(gateway);
            // A second attachment's route is for its own address alone, in a table of its own: runtimes would
            // take it for the container's default route.
            if is_default {
                routes.push(json!({ "dst": everything, "gw": gateway }));
            }
        }
        if with_family {
            ip["version"] = json!(family);
        }
        ips.push(ip);
    }
    let mut interfaces = [
        json!({ "name": added.host_ifname, "mac": added.host_mac }),
        json!({ "name": ifname, "mac": added.mac, "sandbox": netns }),
    ];
    if version == VERSIONS[VERSIONS.len() - 1] {
        for interface in &mut interfaces {
            interface["mtu"] = json!(added.mtu);
        }
    }
    json!({ "cniVersion": version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": {} })
}

/// The answer of a plugin that others of a chain were called before: what they answered, and ours behind it. DNS is
/// theirs alone.
pub fn after(previous: &Value, mut ours: Value) -> Value {
    let list = |result: &Value, key: &str| result[key].as_array().cloned().unwrap_or_default();
    let theirs = list(previous, "interfaces").len();
    for ip in ours["ips"].as_array_mut().into_iter().flatten() {
        ip["interface"] = ip["interface"].as_u64().map_or(Value::Null, |index| json!(index + theirs as u64));
    }
    for key in ["interfaces", "ips", "routes"] {
        ours[key] = [list(previous, key), list(&ours, key)].concat().into();
    }
    if previous["dns"].is_object() {
        ours["dns"] = previous["dns"].clone();
    }
    ours
}

/// What an earlier result says of this attachment and is not so any more. What other plugins of a chain added
/// to it is theirs.
pub fn differences(now: &Value, previous: &Value) -> Vec<String> {
    let list = |result: &Value, key: &str| result[key].as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    let interfaces = list(previous, "interfaces");
    for ours in list(now, "interfaces") {
        // The path of the namespace is another question: it was answered by what it leads to.
        let is_it =
            |it: &&Value| it["name"] == ours["name"] && it["sandbox"].is_string() == ours["sandbox"].is_string();
        match interfaces.iter().find(is_it) {
            None => found.push(format!("it has no interface {}", text(&ours["name"]))),
            Some(theirs) => {
                for key in ["mac", "mtu"] {
                    let said = &theirs[key];
                    let same = match (said.as_str(), ours[key].as_str()) {
                        (Some(said), Some(now)) => said.eq_ignore_ascii_case(now),
                        _ => said.is_null() || ours[key].is_null() || *said == ours[key],
                    };
                    if !same {
                        let name = text(&ours["name"]);
                        found.push(format!("the {key} of {name} is {}, not {}", text(&ours[key]), text(said)));
                    }
                }
            }
        }
    }
    let ours = interfaces.iter().position(|it| it["name"] == now["interfaces"][1]["name"] && it["sandbox"].is_string());
    let of_us = |ip: &Value| ip["interface"].is_null() || ip["interface"].as_u64() == ours.map(|index| index as u64);
    let addresses = |result: &Value| list(result, "ips").into_iter().map(|ip| text(&ip["address"]));
    let (has, said): (Vec<String>, Vec<Value>) = (addresses(now).collect(), list(previous, "ips"));
    for ip in said.iter().filter(|ip| of_us(ip)) {
        let address = text(&ip["address"]);
        if !has.contains(&address) {
            found.push(format!("{address} is not its address"));
        }
    }
    for address in has.iter().filter(|address| !said.iter().any(|ip| text(&ip["address"]) == **address)) {
        found.push(format!("its address {address} is missing"));
    }
    let gateways: Vec<Value> = list(now, "ips").iter().map(|ip| ip["gateway"].clone()).collect();
    let routes = list(now, "routes");
    for route in list(previous, "routes").iter().filter(|route| gateways.contains(&route["gw"])) {
        if !routes.iter().any(|has| has["dst"] == route["dst"] && has["gw"] == route["gw"]) {
            found.push(format!("its route to {} is gone", text(&route["dst"])));
        }
    }
    found
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Address;

    fn answer() -> EndpointAdded {
        EndpointAdded {
            id: 1,
            identity: 300,
            host_ifname: "lxc01234567".into(),
            host_mac: "02:c1:44:12:10:01".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: 1450,
            addresses: vec![
                Address { ip: [10, 244, 0, 5].into(), prefix: 32 },
                Address { ip: "fd00::5".parse().unwrap(), prefix: 128 },
            ],
            gateway_v4: Some([169, 254, 1, 1].into()),
            gateway_v6: Some("fe80::1".parse().unwrap()),
            default_v4: true,
            default_v6: true,
            ready_ms: 1.0,
        }
    }

    #[test]
    fn a_result_names_the_container_side_with_mac_mtu_and_sandbox() {
        let result = added("1.1.0", "eth0", "/run/netns/x", &answer());
        assert_eq!(
            result["interfaces"][1],
            json!({ "name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x", "mtu": 1450 })
        );
        assert_eq!(result["ips"][0], json!({ "interface": 1, "address": "10.244.0.5/32", "gateway": "169.254.1.1" }));
        assert_eq!(result["routes"][1], json!({ "dst": "::/0", "gw": "fe80::1" }));
        assert_eq!(added("1.0.0", "eth0", "/x", &answer())["interfaces"][1]["mtu"], Value::Null, "since 1.1.0");
    }

    #[test]
    fn a_second_attachment_says_its_gateway_and_no_default_route() {
        let second = EndpointAdded { default_v4: false, ..answer() };
        let result = added("1.1.0", "net1", "/run/netns/x", &second);
        assert_eq!(result["ips"][0]["gateway"], "169.254.1.1");
        assert_eq!(result["routes"], json!([{ "dst": "::/0", "gw": "fe80::1" }]));
    }

    #[test]
    fn what_an_earlier_result_says_is_compared_and_what_others_added_is_theirs() {
        let now = added("1.1.0", "eth0", "/run/netns/x", &answer());
        assert_eq!(differences(&now, &now), Vec::<String>::new());
        let mut chained = now.clone();
        chained["interfaces"].as_array_mut().unwrap().push(json!({ "name": "net7", "sandbox": "/run/netns/x" }));
        chained["ips"].as_array_mut().unwrap().push(json!({ "interface": 2, "address": "192.0.2.1/24" }));
        chained["routes"].as_array_mut().unwrap().push(json!({ "dst": "192.0.2.0/24", "gw": "192.0.2.254" }));
        chained["interfaces"][1]["mac"] = json!("02:00:00:00:00:01".to_uppercase());
        assert_eq!(differences(&now, &chained), Vec::<String>::new());
        type Change = fn(&mut Value);
        let changes: [Change; 7] = [
            |it| it["ips"][0]["address"] = json!("10.9.9.9/32"),
            |it| it["ips"][0]["address"] = json!("10.244.0.5/24"),
            |it| it["ips"] = json!([it["ips"][0]]),
            |it| it["interfaces"][1]["mac"] = json!("02:00:00:00:00:02"),
            |it| it["interfaces"][0]["name"] = json!("lxcother"),
            |it| it["interfaces"][1]["mtu"] = json!(9000),
            |it| it["routes"][0]["dst"] = json!("10.0.0.0/8"),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut previous = now.clone();
            change(&mut previous);
            assert!(!differences(&now, &previous).is_empty(), "change {number}: {previous}");
        }
    }

    #[test]
    fn what_plugins_before_this_one_answered_is_passed_on() {
        let ours = added("1.1.0", "net1", "/run/netns/x", &answer());
        let previous = json!({
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "veth7" }, { "name": "eth0", "sandbox": "/run/netns/x" }],
            "ips": [{ "interface": 1, "address": "192.0.2.1/24" }],
            "dns": { "nameservers": ["192.0.2.53"] },
        });
        let both = after(&previous, ours.clone());
        assert_eq!(both["interfaces"][1]["name"], "eth0");
        assert_eq!(both["interfaces"][3], ours["interfaces"][1]);
        assert_eq!((&both["ips"][0]["interface"], &both["ips"][1]["interface"]), (&json!(1), &json!(3)));
        assert_eq!((&both["routes"], &both["dns"]), (&ours["routes"], &previous["dns"]));
        assert_eq!(differences(&ours, &both), Vec::<String>::new(), "CHECK finds its own part");
        assert_eq!(after(&json!({}), ours.clone()), ours);
    }

    #[test]
    fn old_versions_want_the_family_of_an_address() {
        let result = added("0.4.0", "eth0", "/run/netns/x", &answer());
        assert_eq!((&result["ips"][0]["version"], &result["ips"][1]["version"]), (&json!("4"), &json!("6")));
    }
}
