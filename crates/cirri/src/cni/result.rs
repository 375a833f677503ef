//! What ADD answers, and whether an earlier answer still holds.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::spec::{self, VERSIONS};
use crate::api::{Address, EndpointAdded, Told, ToldRoute};

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

/// What a runtime was told of the device inside, by this plugin and those behind it in a chain. `is_place` says whether a
/// path leads to the container's network namespace. `None`: of no such device.
pub fn told(previous: &Value, ifname: &str, is_place: &dyn Fn(&str) -> bool) -> Option<Told> {
    let interfaces = list(previous, "interfaces");
    let called = interfaces.iter().enumerate().filter(|(_, it)| it["name"] == ifname);
    let inside: Vec<(usize, &Value)> = called.filter(|(_, it)| sandbox(it).is_some()).collect();
    // A container may have had several places, and a place several paths, some of which are gone by now. Ours came last.
    let ours = inside.iter().find(|(_, it)| sandbox(it).is_some_and(is_place)).or(inside.last());
    let (index, interface) = ours?;
    let address = |text: &Value| {
        let (ip, prefix) = spec::address(text.as_str()?)?;
        Some(Address { ip, prefix: prefix? })
    };
    let of_us = |ip: &&Value| ip["interface"].as_u64() == Some(*index as u64);
    let route = |route: &Value| {
        let via = route["gw"].as_str()?.parse().ok()?;
        Some(ToldRoute { to: address(&route["dst"])?, via })
    };
    Some(Told {
        mac: interface["mac"].as_str().filter(|mac| !mac.is_empty()).map(str::to_owned),
        mtu: interface["mtu"].as_u64().filter(|mtu| *mtu > 0).and_then(|mtu| mtu.try_into().ok()),
        addresses: list(previous, "ips").iter().filter(of_us).filter_map(|ip| address(&ip["address"])).collect(),
        routes: list(previous, "routes").iter().filter_map(route).collect(),
    })
}

/// What an earlier result does not say of an attachment as it is now: on the node's side nobody else changes anything,
/// and its addresses stay its own. What other plugins of a chain added is theirs.
pub fn differences(now: &EndpointAdded, previous: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let name = &now.host_ifname;
    let outside = |it: &&Value| it["name"] == name.as_str() && sandbox(it).is_none();
    match list(previous, "interfaces").iter().find(outside) {
        None => found.push(format!("it has no interface {name}")),
        Some(told) => {
            if told["mac"].as_str().is_some_and(|mac| !mac.is_empty() && !mac.eq_ignore_ascii_case(&now.host_mac)) {
                found.push(format!("the mac of {name} is {}, not {}", now.host_mac, text(&told["mac"])));
            }
            if told["mtu"].as_u64().is_some_and(|mtu| mtu > 0 && mtu != u64::from(now.mtu)) {
                found.push(format!("the mtu of {name} is {}, not {}", now.mtu, told["mtu"]));
            }
        }
    }
    let told: Vec<(IpAddr, Option<u8>)> =
        list(previous, "ips").iter().filter_map(|ip| spec::address(ip["address"].as_str()?)).collect();
    for Address { ip, prefix } in &now.addresses {
        if !told.contains(&(*ip, Some(*prefix))) {
            found.push(format!("its address {ip}/{prefix} is missing"));
        }
    }
    found
}

/// A list of a result; `null` is as none.
fn list<'a>(result: &'a Value, key: &str) -> &'a [Value] {
    result[key].as_array().map_or(&[], Vec::as_slice)
}

/// Path of the namespace that an interface is in; an empty one is the host's, as is none.
fn sandbox(interface: &Value) -> Option<&str> {
    interface["sandbox"].as_str().filter(|path| !path.is_empty())
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// What it tells of the device inside that was added to `/run/netns/x`.
    fn told_of(previous: &Value) -> Option<Told> {
        told(previous, "eth0", &|path| path == "/run/netns/x")
    }

    #[test]
    fn what_an_earlier_result_says_is_compared_and_what_others_added_is_theirs() {
        let now = answer();
        let said = added("1.1.0", "eth0", "/run/netns/x", &now);
        let told = told_of(&said).unwrap();
        assert_eq!((told.mac.as_deref(), told.mtu), (Some("02:00:00:00:00:01"), Some(1450)));
        assert_eq!(told.addresses, now.addresses);
        let everywhere = Address { ip: [0, 0, 0, 0].into(), prefix: 0 };
        assert_eq!(told.routes[0], ToldRoute { to: everywhere, via: now.gateway_v4.unwrap() });
        assert_eq!(told.routes.len(), 2);
        assert_eq!(differences(&now, &said), Vec::<String>::new());

        let mut chained = said.clone();
        let list = |chained: &mut Value, key: &str, more: Value| chained[key].as_array_mut().unwrap().push(more);
        list(&mut chained, "interfaces", json!({ "name": "net7", "sandbox": "/run/netns/x" }));
        list(&mut chained, "ips", json!({ "interface": 2, "address": "192.0.2.1/24" }));
        list(&mut chained, "ips", json!({ "address": "192.0.2.2/24" }));
        list(&mut chained, "routes", json!({ "dst": "192.0.2.0/24", "gw": null }));
        chained["interfaces"][0]["sandbox"] = json!("");
        chained["interfaces"][0]["mac"] = json!("02:C1:44:12:10:01");
        chained["ips"][1]["address"] = json!("fd00:0:0::0:5/128");
        chained["routes"][1] = json!({ "dst": "0::0/0", "gw": "fe80:0::1" });
        assert_eq!(differences(&now, &chained), Vec::<String>::new());
        assert_eq!(told_of(&chained).unwrap(), told, "others' addresses and routes without a router are not ours");
        assert_eq!(differences(&now, &added("0.4.0", "eth0", "/run/netns/x", &now)), Vec::<String>::new());

        type Change = fn(&mut Value);
        let changes: [Change; 5] = [
            |it| it["ips"][0]["address"] = json!("10.9.9.9/32"),
            |it| it["ips"][0]["address"] = json!("10.244.0.5/24"),
            |it| it["ips"] = json!([it["ips"][0]]),
            |it| it["interfaces"][0]["name"] = json!("lxcother"),
            |it| it["interfaces"][0]["mtu"] = json!(9000),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut previous = said.clone();
            change(&mut previous);
            assert!(!differences(&now, &previous).is_empty(), "change {number}: {previous}");
        }
    }

    #[test]
    fn of_devices_of_one_name_the_one_in_the_containers_place_is_meant() {
        let said = |sandboxes: &[&str]| {
            let one = |(number, sandbox): (usize, &&str)| json!({ "name": "eth0", "sandbox": sandbox, "mac": format!("02:00:00:00:00:0{number}") });
            json!({ "interfaces": sandboxes.iter().enumerate().map(one).collect::<Vec<_>>() })
        };
        let mac = |sandboxes: &[&str]| told_of(&said(sandboxes)).map(|told| told.mac.unwrap().pop().unwrap());
        assert_eq!(mac(&["/run/netns/y", "/run/netns/x"]), Some('1'));
        assert_eq!(mac(&["/run/netns/x", "/run/netns/y"]), Some('0'));
        assert_eq!(mac(&["", "/proc/7/ns/net"]), Some('1'), "a path that is gone by now");
        assert!(mac(&[""]).is_none() && mac(&[]).is_none());
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
        assert_eq!(differences(&answer(), &both), Vec::<String>::new(), "CHECK finds its own part");
        let part = told(&both, "net1", &|path| path == "/run/netns/x").unwrap();
        assert_eq!(part.addresses, answer().addresses);
        assert_eq!(after(&json!({}), ours.clone()), ours);
    }

    #[test]
    fn old_versions_want_the_family_of_an_address() {
        let result = added("0.4.0", "eth0", "/run/netns/x", &answer());
        assert_eq!((&result["ips"][0]["version"], &result["ips"][1]["version"]), (&json!("4"), &json!("6")));
    }
}
