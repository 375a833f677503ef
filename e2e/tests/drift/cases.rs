//! The kinds of drift.

use std::fs;
use std::process::Command;

use super::World;

/// What is done by hand, and what comes of it.
pub struct Case {
    pub name: &'static str,
    pub damage: fn(&World),
    pub comes: Comes,
}

pub enum Comes {
    /// It is made right: the kernel is again as this finds it.
    Repaired(fn(&World) -> String),
    /// It is named by kind and object, until somebody does this.
    Named(&'static str, fn(&World) -> String, fn(&World)),
}
use Comes::{Named, Repaired};

/// Those of a cluster that routes directly.
pub const DIRECT: &[Case] = &[
    Case {
        name: "a rule for a workload's device stands before the main table",
        damage: |w| drop(w.ip(&format!("rule add pref 12 iif {} to {} blackhole", w.device, w.range))),
        comes: Named("route", |w| w.range.clone(), |w| drop(w.ip("rule del pref 12"))),
    },
    Case {
        name: "a rule for workloads' addresses stands before the main table",
        damage: |w| {
            w.ip(&format!("rule add pref 13 from {} lookup 100", w.v4));
            drop(w.ip("route add blackhole default table 100"));
        },
        comes: Named(
            "route",
            |w| w.range.clone(),
            |w| {
                w.ip("rule del pref 13");
                drop(w.ip("route flush table 100"));
            },
        ),
    },
    Case {
        name: "a route to a peer's range by another router on the same device (IPv6, direct)",
        damage: |w| drop(w.ip(&format!("-6 route add {} via fe80::dead dev eth0 metric 1", w.range6))),
        comes: Named(
            "route",
            |w| w.range6.clone(),
            |w| drop(w.ip(&format!("-6 route del {} via fe80::dead dev eth0 metric 1", w.range6))),
        ),
    },
];

/// All of them. Each begins with a node on which all is well.
pub const CASES: &[Case] = &[
    Case {
        name: "routes flushed (IPv4)",
        damage: |w| drop(w.ip("route flush table main proto 193")),
        comes: Repaired(World::routes),
    },
    Case {
        name: "routes flushed (IPv6)",
        damage: |w| drop(w.ip("-6 route flush table main proto 193")),
        comes: Repaired(World::routes),
    },
    Case {
        name: "a route deleted",
        damage: |w| drop(w.ip(&format!("route del {}", w.v4))),
        comes: Repaired(World::routes),
    },
    Case {
        name: "a route replaced by another's",
        damage: |w| drop(w.ip(&format!("route replace blackhole {}", w.v4))),
        comes: Repaired(World::routes),
    },
    Case {
        name: "a route stands before ours (IPv6, smaller metric)",
        damage: |w| drop(w.ip(&format!("-6 route add {}/128 dev eth0 metric 1", w.v6))),
        comes: Named(
            "route",
            |w| w.v6.clone(),
            |w| drop(w.ip(&format!("-6 route del {}/128 dev eth0 metric 1", w.v6))),
        ),
    },
    Case {
        name: "permanent neighbours flushed",
        damage: |w| drop(w.ip("neigh flush nud permanent")),
        comes: Repaired(World::neighbours),
    },
    Case {
        name: "a neighbour with another Ethernet address",
        damage: |w| {
            drop(w.ip(&format!("neigh replace {} dev {} lladdr 02:00:00:00:00:99 nud permanent", w.v4, w.device)))
        },
        comes: Repaired(World::neighbours),
    },
    Case {
        name: "a neighbour that is not permanent any more",
        damage: |w| {
            let to = format!("neigh replace {} dev {} lladdr 02:00:00:00:00:99 nud reachable", w.v4, w.device);
            drop(w.ip(&to));
        },
        comes: Repaired(World::neighbours),
    },
    Case {
        name: "a route of another type, of Cirri's protocol",
        damage: |w| {
            let own = w.json("route show type unreachable proto 193");
            drop(w.ip(&format!("route replace prohibit {} proto 193", own[0]["dst"].as_str().unwrap())));
        },
        comes: Repaired(World::routes),
    },
    Case {
        name: "a route with a locked MTU, of Cirri's protocol",
        damage: |w| drop(w.ip(&format!("route replace {} mtu lock 600", w.route_to_near()))),
        comes: Repaired(World::routes),
    },
    Case {
        name: "a policy rule stands before the main table",
        damage: |w| drop(w.ip(&format!("rule add pref 10 to {} blackhole", w.range))),
        comes: Named("route", |w| w.range.clone(), |w| drop(w.ip("rule del pref 10"))),
    },
    Case {
        name: "a rule for the node's own address stands before the main table",
        damage: |w| {
            w.ip(&format!("rule add pref 11 from {} lookup 100", w.addresses[0].split('/').next().unwrap()));
            w.ip("route add blackhole default table 100");
        },
        comes: Named(
            "route",
            |w| w.range.clone(),
            |w| {
                w.ip("rule del pref 11");
                drop(w.ip("route flush table 100"));
            },
        ),
    },
    Case {
        name: "a route to one address of a peer's range",
        damage: |w| drop(w.ip(&format!("route add blackhole {}", w.far))),
        comes: Named("route", |w| w.far.clone(), |w| drop(w.ip(&format!("route del blackhole {}", w.far)))),
    },
    Case {
        name: "a route to a peer's range by another router on the same device (IPv6)",
        damage: |w| drop(w.ip(&format!("-6 route add {} via fe80::dead dev cirri_vxlan metric 1", w.range6))),
        comes: Named(
            "route",
            |w| w.range6.clone(),
            |w| drop(w.ip(&format!("-6 route del {} via fe80::dead dev cirri_vxlan metric 1", w.range6))),
        ),
    },
    Case {
        name: "the rule of the main table is gone",
        damage: |w| drop(w.ip("rule del pref 32766")),
        comes: Named("route", |_| "policy rules of IPv4".to_owned(), |w| drop(w.ip("rule add pref 32766 table main"))),
    },
    Case {
        name: "the overlay device deleted",
        damage: |w| drop(w.ip("link del cirri_vxlan")),
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "the overlay device down",
        damage: |w| drop(w.ip("link set cirri_vxlan down")),
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "the overlay device with another MTU",
        damage: |w| drop(w.ip("link set cirri_vxlan mtu 1200")),
        comes: Repaired(World::overlay),
    },
    Case {
        name: "the overlay device with ARP",
        damage: |w| drop(w.ip("link set cirri_vxlan arp on")),
        comes: Repaired(World::overlay),
    },
    Case {
        name: "the overlay device with a filter of VNIs",
        damage: |w| w.remake_overlay("external vnifilter dstport 8472"),
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "the overlay device with another header",
        damage: |w| w.remake_overlay("external gpe dstport 8472"),
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "the overlay device made otherwise",
        damage: |w| {
            w.ip("link del cirri_vxlan");
            // The agent may be faster: then there is one of the name.
            let add = ["ip", "link", "add", "cirri_vxlan", "type", "vxlan", "id", "7", "dstport", "4790"];
            drop(w.node.run(|| Command::new(add[0]).args(&add[1..]).output()).unwrap());
        },
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "the overlay device renamed",
        damage: |w| {
            w.ip("link set cirri_vxlan down");
            drop(
                w.node
                    .run(|| Command::new("ip").args("link set cirri_vxlan name other0 up".split(' ')).output())
                    .unwrap(),
            );
        },
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "a workload's device down",
        damage: |w| drop(w.ip(&format!("link set {} down", w.device))),
        comes: Repaired(|w| w.link(&w.device) + &w.routes() + &w.neighbours()),
    },
    Case {
        name: "a workload's device with another MTU",
        damage: |w| drop(w.ip(&format!("link set {} mtu 900", w.device))),
        comes: Repaired(|w| w.link(&w.device)),
    },
    Case {
        name: "a workload's device with another Ethernet address",
        damage: |w| drop(w.ip(&format!("link set {} address 02:00:00:00:00:77", w.device))),
        comes: Repaired(|w| w.link(&w.device)),
    },
    Case {
        name: "a workload's device in a bridge",
        damage: |w| {
            w.ip("link add br-other type bridge");
            w.ip(&format!("link set {} master br-other", w.device));
        },
        comes: Repaired(|w| w.link(&w.device)),
    },
    Case {
        name: "a workload's device renamed",
        damage: |w| {
            w.ip(&format!("link set {} down", w.device));
            let rename = format!("link set {} name other1 up", w.device);
            drop(w.node.run(|| Command::new("ip").args(rename.split(' ')).output()).unwrap());
        },
        comes: Repaired(|w| w.link(&w.device) + &w.routes()),
    },
    Case {
        name: "a workload's device with another alias",
        damage: |w| {
            let alias = ["ip", "link", "set", &w.device, "alias", "uplink of near"];
            drop(cirri_e2e::lab::printed(&w.node, &alias));
        },
        comes: Repaired(|w| w.link(&w.device)),
    },
    Case {
        name: "a workload's device without an alias",
        damage: |w| drop(cirri_e2e::lab::printed(&w.node, &["ip", "link", "set", &w.device, "alias", ""])),
        comes: Repaired(|w| w.link(&w.device)),
    },
    Case {
        name: "a workload's device without IPv6",
        damage: |w| w.write_sysctl(&format!("ipv6/conf/{}/disable_ipv6", w.device), "1"),
        comes: Repaired(|w| w.sysctl(&format!("ipv6/conf/{}/disable_ipv6", w.device)) + &w.routes()),
    },
    Case {
        name: "the container's end of a workload's device down",
        damage: |w| w.inside_near("ip link set eth0 down"),
        comes: Named(
            "device",
            |w| w.device.clone(),
            |w| {
                let again = format!("ip link set eth0 up; ip addr add {}/128 dev eth0 nodad", w.v6);
                let routes = "ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1 dev eth0 onlink";
                w.inside_near(&format!("{again}; {routes}; ip -6 route add default via fe80::1 dev eth0"));
            },
        ),
    },
    Case {
        name: "the device to the network down",
        damage: |w| drop(w.ip("link set eth0 down")),
        comes: Named("device", |_| "eth0".to_owned(), World::bring_eth0_back),
    },
    Case {
        name: "the device to the network without a carrier",
        damage: |w| w.set_wire("down"),
        comes: Named("device", |_| "eth0".to_owned(), |w| w.set_wire("up")),
    },
    Case {
        name: "the node's address removed",
        damage: |w| drop(w.ip(&format!("addr del {} dev eth0", w.addresses[0]))),
        comes: Named("address", |w| w.addresses[0].split('/').next().unwrap().to_owned(), World::bring_eth0_back),
    },
    Case {
        name: "programs detached from a workload's device",
        damage: |w| w.pins.detach(&format!("from_workload-{}", w.ifindex)),
        comes: Repaired(World::programs),
    },
    Case {
        name: "programs detached from the device to the network",
        damage: |w| {
            let eth0 = w.json("link show eth0")[0]["ifindex"].clone();
            w.pins.detach(&format!("from_network-{eth0}"));
        },
        comes: Repaired(World::programs),
    },
    Case {
        name: "a program of somebody else before those of a workload's device",
        damage: |w| w.stand_before(&w.device),
        comes: Repaired(|w| w.first_program(&w.device)),
    },
    Case {
        name: "a program of somebody else before those of the device to the network",
        damage: |w| w.stand_before("eth0"),
        comes: Repaired(|w| w.first_program("eth0")),
    },
    Case {
        name: "a program of somebody else before those of the overlay device",
        damage: |w| w.stand_before("cirri_vxlan"),
        comes: Repaired(|w| w.first_program("cirri_vxlan")),
    },
    Case {
        name: "a program detached from the sockets",
        damage: |w| w.pins.detach("connect4-0"),
        comes: Repaired(|w| w.pins.attached("connect4-0")),
    },
    Case {
        name: "a pin of a link removed",
        damage: |w| fs::remove_file(w.pins.0.join(format!("links/to_workload-{}", w.ifindex))).unwrap(),
        comes: Repaired(|w| w.pins.names() + &w.programs()),
    },
    Case {
        name: "the pin of a map removed",
        damage: |w| fs::remove_file(w.pins.maps().join("IPCACHE")).unwrap(),
        comes: Repaired(|w| w.pins.names()),
    },
    Case {
        name: "all pins removed",
        damage: |w| fs::remove_dir_all(&w.pins.0).unwrap(),
        comes: Repaired(|w| w.pins.names() + &w.programs()),
    },
    Case {
        name: "all programs detached and all pins removed",
        damage: |w| {
            w.while_stopped(|| {
                let links = fs::read_dir(w.pins.0.join("links")).unwrap().map(|it| it.unwrap().file_name());
                links.for_each(|link| w.pins.detach(link.to_str().unwrap()));
                fs::remove_dir_all(&w.pins.0).unwrap();
            });
        },
        comes: Repaired(|w| w.pins.names() + &w.programs() + &w.pins.attached("connect4-0")),
    },
    Case {
        name: "the address cache emptied",
        damage: |w| w.pins.delete_entries("IPCACHE"),
        comes: Repaired(|w| w.pins.shown("IPCACHE")),
    },
    Case {
        name: "endpoints removed",
        damage: |w| w.pins.delete_entries("ENDPOINTS"),
        comes: Repaired(|w| w.pins.shown("ENDPOINTS")),
    },
    Case {
        name: "devices altered",
        damage: |w| w.pins.clear_entries("DEVICES"),
        comes: Repaired(|w| w.pins.shown("DEVICES") + &w.pins.shown("ENDPOINTS")),
    },
    Case {
        name: "rule sets removed",
        damage: |w| w.pins.delete_entries("RULESETS"),
        comes: Repaired(|w| w.pins.slots("RULESETS")),
    },
    Case {
        name: "the node's row cleared",
        damage: |w| w.pins.clear_entries("NODE"),
        comes: Repaired(|w| w.pins.shown("NODE")),
    },
    Case {
        name: "identities that rule sets know, cleared",
        damage: |w| w.pins.clear_entries("IDENTITIES"),
        comes: Repaired(|w| w.pins.shown("IDENTITIES")),
    },
    Case {
        // It moves on, so that no recipe from before is good again.
        name: "epochs set back",
        damage: |w| w.pins.clear_entries("EPOCHS"),
        comes: Repaired(|w| format!("{}", w.pins.occupied("EPOCHS"))),
    },
    Case {
        name: "services removed",
        damage: |w| w.pins.delete_entries("SERVICES"),
        comes: Repaired(|w| w.pins.shown("SERVICES")),
    },
    Case {
        name: "forwarding turned off",
        damage: |w| w.write_sysctl("ipv4/ip_forward", "0"),
        comes: Repaired(|w| w.sysctl("ipv4/ip_forward")),
    },
    Case {
        name: "forwarding turned off for single devices",
        damage: |w| {
            for device in ["eth0", &w.device, "cirri_vxlan"] {
                w.write_sysctl(&format!("ipv4/conf/{device}/forwarding"), "0");
                w.write_sysctl(&format!("ipv6/conf/{device}/forwarding"), "0");
            }
        },
        comes: Repaired(|w| {
            let devices = ["eth0", &w.device, "cirri_vxlan"];
            let both = |it| ["ipv4", "ipv6"].map(|family| w.sysctl(&format!("{family}/conf/{it}/forwarding"))).concat();
            devices.map(both).concat()
        }),
    },
    Case {
        name: "the reverse-path filter turned on",
        damage: |w| {
            for device in ["all", "eth0", &w.device] {
                w.write_sysctl(&format!("ipv4/conf/{device}/rp_filter"), "1");
            }
        },
        comes: Repaired(|w| {
            ["all", "eth0", &w.device].map(|it| w.sysctl(&format!("ipv4/conf/{it}/rp_filter"))).concat()
        }),
    },
    Case {
        name: "the reserved ports given away",
        damage: |w| w.write_sysctl("ipv4/ip_local_reserved_ports", ""),
        comes: Repaired(|w| w.sysctl("ipv4/ip_local_reserved_ports")),
    },
    Case {
        name: "the files of endpoints removed",
        damage: |w| ["endpoints", "endpoints.copy"].iter().for_each(|it| fs::remove_dir_all(w.state(it)).unwrap()),
        comes: Repaired(|w| {
            let names = |it: &&str| w.names_in(it);
            ["endpoints", "endpoints.copy"].iter().map(names).collect::<Vec<_>>().concat()
        }),
    },
    Case {
        name: "the file of what was seen in the store removed",
        damage: |w| fs::remove_file(w.state("seen.redb")).unwrap(),
        comes: Repaired(|w| w.state("seen.redb").exists().to_string()),
    },
    Case {
        name: "another file in the place of what was seen in the store",
        damage: |w| {
            fs::remove_file(w.state("seen.redb")).unwrap();
            fs::write(w.state("seen.redb"), "another").unwrap();
        },
        comes: Named("file", |_| "seen.redb".to_owned(), |w| fs::remove_file(w.state("seen.redb")).unwrap()),
    },
    Case {
        name: "the record of settings removed",
        damage: |w| fs::remove_file(w.record()).unwrap(),
        comes: Repaired(|w| fs::read_to_string(w.record()).unwrap_or_default()),
    },
];
