//! A node that drifts: what the agent made in the kernel is taken away, altered or got in the way of, by hand, as
//! network managers and people do. Each is made right or named within seconds, and then all is well again.
//!
//! What is there is read from the kernel (`ip`, `bpftool`, `/proc/sys`), never from the agent.

mod drift;

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::time::{Duration, Instant};

use cirri_e2e::cni::state_dir;
use cirri_e2e::kernel::TestNamespace;
use cirri_e2e::lab::{Lab, eventually, output, printed};
use cirri_loader::net::Namespace;
use drift::Comes::{Named, Repaired};
use drift::{CASES, Case, DIRECT, SHOP, World, world, world_with};
use serde_json::Value;

/// For what takes some seconds, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(40);

#[test]
fn every_kind_of_drift_is_made_right_or_named_and_then_all_is_well() {
    let world = world("drift");
    try_all(&world, CASES);
    world.assert_traffic("after all of it");
    let socket = world.lab.socket("node1");
    eventually("that the socket was removed is said", PATIENCE, || {
        // Made again already, perhaps.
        let _ = fs::remove_file(&socket);
        let asked = output(["--socket", &socket, "status"]).unwrap();
        let said = String::from_utf8_lossy(&asked.stderr).into_owned();
        asked.status.code() == Some(3) && said.contains("somebody removed the socket") && said.contains("ask again")
    });
    eventually("the socket is made again and all is well", PATIENCE, || {
        output(["--socket", &socket, "status", "--check"]).unwrap().status.success()
    });
    if std::env::var_os("CIRRI_DRIFT").is_none() {
        let repaired = world.status()["repaired"].clone();
        for kind in ["device", "route", "program", "pin", "map", "setting"] {
            assert!(repaired[kind].as_u64() > Some(0), "{kind} is not counted: {repaired}");
        }
    }
}

#[test]
fn with_direct_routing_rules_and_routes_of_others_are_named_too() {
    try_all(&world_with("drift_direct", &["--routing", "direct"]), DIRECT);
}

/// Each of them, whatever became of the others.
fn try_all(world: &World, all: &[Case]) {
    let (mut failed, mut times) = (Vec::new(), Vec::new());
    // While one works on some of them: those whose names have this in them.
    let only = std::env::var("CIRRI_DRIFT").unwrap_or_default();
    let cases: Vec<&Case> = all.iter().filter(|case| case.name.contains(&only)).collect();
    for case in cases {
        match catch_unwind(AssertUnwindSafe(|| try_case(world, case))) {
            Ok(took) => times.push((took, case)),
            Err(_) => {
                println!("{}: FAILED, with {:#}", case.name, world.status()["problems"]);
                failed.push(case.name);
                // The next case must not stand on the ruins of this one.
                let _ = world.lab.restart("node1", &[]);
            }
        }
    }
    times.sort_by_key(|(took, _)| std::cmp::Reverse(*took));
    for (took, case) in times {
        let what = if matches!(case.comes, Repaired(_)) { "repaired" } else { "named" };
        println!("{:6.2} s until {what}: {}", took.as_secs_f64(), case.name);
    }
    assert!(failed.is_empty(), "{} kinds: {failed:#?}", failed.len());
}

/// How long it took until it was made right or named.
fn try_case(world: &World, case: &Case) -> Duration {
    eventually("all is well before", PATIENCE, || world.is_well());
    let took = match &case.comes {
        Repaired(state) => {
            let (before, repairs) = (state(world), world.repairs());
            (case.damage)(world);
            let damaged = Instant::now();
            eventually(case.name, PATIENCE, || state(world) == before && world.repairs() > repairs);
            damaged.elapsed()
        }
        Named(what, object, mend) => {
            (case.damage)(world);
            let damaged = Instant::now();
            let object = object(world);
            let named = catch_unwind(AssertUnwindSafe(|| {
                eventually(case.name, PATIENCE, || world.names(what, &object));
                let took = damaged.elapsed();
                assert!(!world.is_well(), "{}: status --check says that all is well", case.name);
                took
            }));
            mend(world);
            named.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        }
    };
    eventually("all is well after it", PATIENCE, || world.is_well());
    world.assert_traffic(case.name);
    took
}

#[test]
fn two_who_manage_one_route_do_not_fight_for_ever_and_status_says_so() {
    let world = world("drift_fight");
    let (node, route) = (world.node.clone(), format!("route del {}", world.v4));
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || {
        let mut deleted = 0;
        while stopped.try_recv().is_err() {
            let done = node.run(|| Command::new("ip").args(route.split(' ')).output()).unwrap().unwrap();
            deleted += u32::from(done.status.success());
            // Awaits nothing: this is what a manager that polls does.
            std::thread::sleep(Duration::from_millis(50));
        }
        deleted
    });
    let object = format!("{}/32", world.v4);
    // That the route is not followed while it is gone may be named before, and is no fight.
    let is_it = |problem: &Value| {
        let remedy = problem["remedy"].as_str().unwrap();
        problem["what"] == "route" && problem["object"] == *object && remedy.contains("again and again")
    };
    eventually("the fight is named", PATIENCE, || world.status()["problems"].as_array().unwrap().iter().any(is_it));
    let repaired = |()| world.status()["repaired"]["route"].as_u64().unwrap();
    let before = repaired(());
    // Rationed: over the next seconds hardly any more, although the other goes on.
    std::thread::sleep(Duration::from_secs(5));
    assert!(repaired(()) - before <= 2, "{} repairs in five seconds", repaired(()) - before);
    stop.send(()).unwrap();
    assert!(other.join().unwrap() > 0);
    let there = || world.json("route show table main proto 193").iter().any(|route| route["dst"] == *world.v4);
    eventually("the route is back", PATIENCE, there);
    eventually("all is well when the other has left it alone", PATIENCE, || world.is_well());
}

#[test]
fn a_device_to_the_network_that_comes_back_with_another_number_is_taken_up() {
    let world = world("drift_moved");
    let programs = world.programs();
    let number = |()| world.json("link show eth0")[0]["ifindex"].as_u64().unwrap();
    let before = number(());
    // In a namespace where its number is another's it gets a new one, and keeps that.
    let aside = TestNamespace::new();
    let taken = format!("ip link add taken index {before} type veth peer name other index {}", before + 100);
    printed(&aside.namespace, &taken.split(' ').collect::<Vec<_>>());
    let home = world.lab.node("node1").unwrap().netns;
    world.ip(&format!("link set eth0 netns {}", aside.name()));
    printed(&aside.namespace, &["ip", "link", "set", "eth0", "netns", home.file_name().unwrap().to_str().unwrap()]);
    assert_ne!(number(()), before);
    world.bring_eth0_back();
    eventually("its programs are on it", PATIENCE, || world.programs() == programs);
    eventually("all is well", PATIENCE, || world.is_well());
    world.assert_traffic("with another number");
}

#[test]
fn a_workload_whose_device_somebody_wrote_on_is_taken_up_by_the_next_start() {
    let world = world("drift_alias");
    world.lab.kill_agent("node1").unwrap();
    printed(&world.node, &["ip", "link", "set", &world.device, "alias", "uplink of near"]);
    world.lab.restart("node1", &[]).unwrap();
    let endpoints: Vec<Value> = world.lab.ask("node1", &["endpoint", "list"]).unwrap();
    assert!(endpoints.iter().any(|it| it["pod"] == "near"), "it was released: {endpoints:#?}");
    let alias = |()| world.json(&format!("link show {}", world.device))[0]["ifalias"].clone();
    eventually("it says whose it is again", PATIENCE, || {
        alias(()).as_str().is_some_and(|alias| alias.starts_with("cirri "))
    });
    eventually("all is well", PATIENCE, || world.is_well());
    world.assert_traffic("after it");
}

#[test]
fn a_program_before_the_stack_is_put_back_and_one_of_somebody_else_is_named() {
    let world = world_with("drift_edge", &["--set", "services.acceleration=native"]);
    let pin = format!("edge-{}", world.json("link show eth0")[0]["ifindex"]);
    let is_on = |()| world.pins.attached(&pin);
    let (before, devices) = (is_on(()), world.pins.shown("EDGE_DEVICES"));
    world.pins.detach(&pin);
    eventually("it is put back", PATIENCE, || is_on(()) == before && world.repairs() > 0);
    eventually("all is well", PATIENCE, || world.is_well());

    let repairs = world.repairs();
    world.pins.clear_entries("EDGE_DEVICES");
    eventually("the Ethernet address is back", PATIENCE, || {
        world.repairs() > repairs && world.pins.shown("EDGE_DEVICES") == devices
    });

    // Another program takes its place: any will do, and one is pinned.
    let programs = fs::read_dir(world.pins.0.join("programs")).unwrap().map(|entry| entry.unwrap().path());
    let any = programs.into_iter().find(|path| path.display().to_string().contains("/edge-")).unwrap();
    let (any, place) = (any.display().to_string(), world.node.clone());
    let attach = ["bpftool", "net", "attach", "xdpdrv", "pinned", &any, "dev", "eth0"];
    eventually("somebody else was faster", PATIENCE, || {
        world.pins.detach_if_there(&pin);
        place.run(|| Command::new(attach[0]).args(&attach[1..]).output()).unwrap().unwrap().status.success()
    });
    eventually("it is named", PATIENCE, || {
        let problems = world.status()["problems"].to_string();
        problems.contains("another XDP program") && !world.is_well()
    });
    printed(&world.node, &["bpftool", "net", "detach", "xdpdrv", "dev", "eth0"]);
    eventually("it is back when the other has gone", PATIENCE, || is_on(()) == before);
    eventually("all is well", PATIENCE, || world.is_well());
}

#[test]
fn a_workload_whose_namespace_goes_without_del_is_named_and_then_its_address_is_free() {
    let lab = Lab::up("drift_gone", 1, &["--set", "node.releaseAfterSeconds=4"]).unwrap();
    lab.apply(&SHOP.replace("nodeName: node2", "nodeName: node1")).unwrap();
    let socket = lab.socket("node1");
    let pod = lab.list().unwrap().pods.into_iter().find(|pod| pod.name == "near").unwrap();
    // One that lost its name only is alive: its processes hold it.
    let name = pod.netns.file_name().unwrap().to_str().unwrap().to_owned();
    let inside = Namespace::open(&pod.netns).unwrap();
    let processes: BTreeSet<i32> = processes_in(&inside);
    assert!(!processes.is_empty());
    assert!(Namespace::delete(&name).unwrap());
    drop(inside);
    let endpoints = |()| -> Vec<Value> { lab.ask("node1", &["endpoint", "list"]).unwrap() };
    let near = |()| endpoints(()).into_iter().find(|it| it["pod"] == "near");
    std::thread::sleep(Duration::from_secs(6));
    assert!(near(()).is_some(), "a namespace that only lost its name was released");
    // Now it is gone for good, and nobody says DEL.
    processes.iter().for_each(|pid| cirri_e2e::lab::kill(*pid).unwrap());
    let problems = |()| lab.ask::<Value>("node1", &["status"]).unwrap()["problems"].to_string();
    eventually("it is named", PATIENCE, || problems(()).contains("shop/near"));
    eventually("it is released", PATIENCE, || near(()).is_none());
    eventually("all is well", PATIENCE, || {
        output(["--socket", &socket, "status", "--check"]).unwrap().status.success()
    });
}

#[test]
fn what_somebody_changes_in_a_container_is_named_within_seconds_and_left_alone() {
    const WITHIN: Duration = Duration::from_secs(5);
    let world = world("drift_inside");
    let problem = || found_in(&world, "near");
    // What is otherwise before that was made by a plugin of the chain.
    eventually("the chain is noted", PATIENCE, || written(&world, "near")["chain_noted"] == true);
    let (v4, v6) = (&world.v4, &world.v6);
    let gateway = "ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1 dev eth0 onlink";
    let cases = [
        ("ip route flush table main", "no route to 0.0.0.0/0", gateway.to_owned()),
        ("ip -6 route del default", "no route to ::/0", "ip -6 route add default via fe80::1 dev eth0".to_owned()),
        (&format!("ip addr del {v4}/32 dev eth0"), v4, format!("ip addr add {v4}/32 dev eth0; {gateway}")),
        (&format!("ip addr del {v6}/128 dev eth0"), v6, format!("ip addr add {v6}/128 dev eth0 nodad")),
        ("ip link set eth0 mtu 9000", "MTU", "ip link set eth0 mtu 1450".to_owned()),
        ("ip link set lo down", "lo is down", "ip link set lo up".to_owned()),
    ];
    let all = ["-4 route", "-6 route", "addr", "link"].map(|it| format!("ip {it} show")).join("; ");
    let state = |()| printed(&world.lab.netns("shop/near").unwrap(), &["sh", "-c", &all]);
    let mtu =
        state(()).split("eth0@").nth(1).unwrap().split("mtu ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    for restarted in [false, true] {
        for (damage, says, mend) in &cases {
            eventually("all is well before", PATIENCE, || world.is_well());
            world.inside_near(damage);
            let (damaged, began) = (state(()), Instant::now());
            eventually(&format!("{damage} is named"), PATIENCE, || {
                problem().is_some_and(|found| found.contains(*says))
            });
            let took = began.elapsed();
            println!("{:6.2} s until named: {damage}", took.as_secs_f64());
            assert!(took < WITHIN && !world.is_well(), "{damage}: {took:?}");
            assert_eq!(state(()), damaged, "the agent changed something in the container");
            world.inside_near(&mend.replace("mtu 1450", &format!("mtu {mtu}")));
        }
        eventually("all is well after it", PATIENCE, || world.is_well());
        world.assert_traffic("after it");
        if !restarted {
            world.lab.restart("node1", &[]).unwrap();
        }
    }
}

#[test]
fn what_a_later_plugin_of_the_chain_made_in_a_container_is_no_drift_also_after_a_restart() {
    let world = world("drift_chain");
    // On a busy machine the plugin may be too late; then another pod has its turn.
    let pod = (0..10).map(|number| format!("chained{number}")).find(|pod| {
        let manifest = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}, namespace: shop}}\n\
             spec: {{nodeName: node1, containers: [{{name: c, image: none}}]}}\n"
        );
        world.lab.apply(&format!("{SHOP}---\n{manifest}")).unwrap();
        printed(&world.lab.netns(&format!("shop/{pod}")).unwrap(), &["ip", "route", "del", "default"]);
        written(&world, pod)["chain_noted"] == false
    });
    let pod = pod.expect("a plugin that is in time");
    eventually("the chain is noted", PATIENCE, || written(&world, &pod)["chain_noted"] == true);
    let taken = "no route to 0.0.0.0/0";
    assert!(written(&world, &pod)["chained"].to_string().contains(taken), "{}", written(&world, &pod));
    let inside = world.lab.netns(&format!("shop/{pod}")).unwrap();
    for when in ["before", "after"] {
        // That it was compared is told by something else, which is drift.
        printed(&inside, &["ip", "link", "set", "lo", "down"]);
        eventually("what is drift is named", PATIENCE, || {
            found_in(&world, &pod).is_some_and(|found| found.contains("lo is down"))
        });
        let found = found_in(&world, &pod).unwrap();
        assert!(!found.contains(taken), "{when} a restart: {found}");
        printed(&inside, &["ip", "link", "set", "lo", "up"]);
        eventually("all is well", PATIENCE, || world.is_well());
        if when == "before" {
            world.lab.restart("node1", &[]).unwrap();
        }
    }
}

/// What status says of the inside of a pod's container.
fn found_in(world: &World, pod: &str) -> Option<String> {
    let problems = world.status()["problems"].as_array().unwrap().clone();
    let name = format!("shop/{pod} ");
    let its = |it: &Value| it["what"] == "endpoint" && it["object"].as_str().unwrap().starts_with(&name);
    problems.iter().find(|it| its(it)).map(|it| it["found"].as_str().unwrap().to_owned())
}

/// What the agent has written down of a pod's endpoint.
fn written(world: &World, pod: &str) -> Value {
    let files = fs::read_dir(state_dir(&world.lab).join("endpoints")).unwrap().flatten();
    // One may go, or be replaced, while it is looked at.
    let all = files.filter_map(|file| serde_json::from_slice::<Value>(&fs::read(file.path()).ok()?).ok());
    all.into_iter().find(|it| it["pod"] == pod).unwrap_or_default()
}

fn processes_in(namespace: &Namespace) -> BTreeSet<i32> {
    use std::os::unix::fs::MetadataExt;
    let wanted = namespace.file().metadata().unwrap().ino();
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|it| it.ino() == wanted)).collect()
}
