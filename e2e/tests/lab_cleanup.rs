//! Nothing stays behind: the machine after `agent --cleanup`, `lb down`, `lb backend --remove` and `lab down` is
//! as it was before, by what the kernel and the file system say; and who fails or leaves takes nothing away that
//! somebody else has.

mod cleanup;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cirri_e2e::lab::{self, Lab, binary, eventually, printed};
use cirri_e2e::pinned::Pinned;
use serde_json::Value;

use cleanup::{Machine, PATIENCE, Running};

#[test]
fn the_machine_after_cleanup_is_as_before_the_agent_also_when_killed_and_when_its_state_is_lost() {
    let machine = Machine::new("clean");
    let before = machine.state();
    let instance = machine.name.clone();
    let cleanup = |()| machine.well(&["agent", "--config", &machine.agent_file(&instance, ""), "--cleanup"]);

    let agent = machine.agent(&instance);
    machine.add_pod(&instance);
    assert_eq!(machine.get("ipv4/ip_forward"), "1");
    let running = machine.state();
    let refused = machine.cirri(&["agent", "--config", &machine.agent_file(&instance, ""), "--cleanup"]);
    assert!(!refused.status.success(), "cleanup beside a running agent");
    machine.assert_state(&running, "a cleanup that was refused");
    agent.stop();
    cleanup(());
    machine.assert_state(&before, "stopped in good order");
    cleanup(());
    machine.assert_state(&before, "cleaned twice");

    let agent = machine.agent(&instance);
    machine.add_pod(&instance);
    drop(agent);
    cleanup(());
    machine.assert_state(&before, "killed");

    let agent = machine.agent(&instance);
    machine.add_pod(&instance);
    drop(agent);
    fs::remove_dir_all(machine.path(&format!("var/cirri/state-{instance}"))).unwrap();
    cleanup(());
    machine.assert_state(&before, "killed, and its state lost");
}

#[test]
fn a_device_that_left_the_configuration_is_as_before_once_the_agent_has_started_again() {
    let machine = Machine::new("leaving");
    machine.set("ipv4/conf/eth1/rp_filter", "2");
    let before = machine.state();
    let instance = machine.name.clone();
    // At a device's edge, too.
    let accelerated = "acceleration: generic, socket: {mode: off}";
    let run = |devices: &str, count: u64| {
        let file = machine.agent_file(&instance, "");
        let text = fs::read_to_string(&file).unwrap().replace("devices: [eth0]", devices);
        fs::write(&file, text.replace("socket: {mode: off}", accelerated)).unwrap();
        let running = machine.spawn(&["agent", "--config", &file], &instance);
        let socket = machine.path(&format!("var/cirri/state-{instance}/agent.sock")).display().to_string();
        eventually("the devices have their programs", PATIENCE, || {
            let answer = machine.cirri(&["status", "-o", "json", "--socket", &socket]).stdout;
            let status: Value = serde_json::from_slice(&answer).unwrap_or_default();
            let tables = status["tables"].as_array().map_or(&[][..], Vec::as_slice);
            // The overlay's, too.
            tables.iter().any(|it| it["name"] == "attachments" && it["done"] == count + 1 && it["pending"] == 0)
        });
        running.stop();
        machine.state()
    };
    let alone = run("devices: [eth0]", 1);
    let both = run("devices: [eth0, eth1]", 2);
    for kind in ["links", "pins", "settings"] {
        assert_ne!(alone[kind], both[kind], "{kind}: nothing was done to the second device");
    }
    run("devices: [eth0]", 1);
    machine.assert_state(&alone, "the second device is not the node's any more");
    machine.well(&["agent", "--config", &machine.agent_file(&instance, ""), "--cleanup"]);
    machine.assert_state(&before, "cleaned");
}

#[test]
fn a_container_that_lives_on_is_as_before_after_the_cleanup() {
    let machine = Machine::new("container");
    let instance = machine.name.clone();
    let rules = |()| printed(&machine.pod.namespace, &["sh", "-c", "ip rule; ip -6 rule; ip route show table all"]);
    printed(&machine.pod.namespace, &["ip", "link", "set", "lo", "up"]);
    let before = rules(());
    let agent = machine.agent(&instance);
    machine.add(&instance, "eth0");
    machine.add(&instance, "eth1");
    assert_ne!(rules(()), before);
    agent.stop();
    machine.well(&["agent", "--config", &machine.agent_file(&instance, ""), "--cleanup"]);
    assert_eq!(rules(()), before);
}

#[test]
fn where_the_mtu_is_too_small_for_ipv6_pods_have_ipv4_alone_or_the_agent_refuses_to_start() {
    let machine = Machine::new("mtu");
    let instance = machine.name.clone();
    // Too small for the overlay, with an IPv6 address on it; and too small for any.
    for (mtu, more, least) in [(1300, "", "1330 or more"), (1200, "routing: {mode: direct}\n", "1280 or more")] {
        machine.ip(&format!("link set eth0 mtu {mtu}"));
        let before = machine.state();
        let file = machine.agent_file(&instance, &format!("{more}cluster: {{podCidrV6: 'fd00:10:244::/48'}}\n"));
        let refused = machine.cirri(&["agent", "--config", &file]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("podCidrV6") && said.contains(least), "{said}");
        machine.assert_state(&before, "refused");

        let file = machine.agent_file(&instance, more);
        let agent = machine.spawn(&["agent", "--config", &file], &instance);
        let socket = machine.path(&format!("var/cirri/state-{instance}/agent.sock"));
        eventually("the agent is ready", PATIENCE, || socket.exists());
        let added = machine.add(&instance, "eth0");
        let addresses: Vec<&str> =
            added["ips"].as_array().unwrap().iter().filter_map(|it| it["address"].as_str()).collect();
        assert!(addresses.len() == 1 && addresses[0].starts_with("10.244."), "{added}");
        let check = machine.cni("CHECK", &instance, "eth0", &added);
        assert!(check.status.success(), "CHECK: {}", String::from_utf8_lossy(&check.stdout));
        let status = |()| {
            let answer = machine.cirri(&["status", "-o", "json", "--socket", &socket.display().to_string()]).stdout;
            serde_json::from_slice::<Value>(&answer).unwrap_or_default()
        };
        assert!(status(())["without_v6"].as_str().is_some_and(|why| why.contains(least)), "{}", status(()));
        eventually("all is well", PATIENCE, || status(())["problems"] == Value::Array(Vec::new()));
        agent.stop();
        machine.well(&["agent", "--config", &file, "--cleanup"]);
        machine.assert_state(&before, &format!("cleaned, with an MTU of {mtu}"));
    }
}

#[test]
fn what_somebody_else_changed_since_stays_as_he_wants_it() {
    let machine = Machine::new("since");
    let instance = machine.name.clone();
    machine.agent(&instance).stop();
    machine.set("ipv4/conf/eth0/rp_filter", "2");
    machine.set("ipv4/conf/wire/forwarding", "0");
    let ports = machine.get("ipv4/ip_local_reserved_ports");
    machine.set("ipv4/ip_local_reserved_ports", &format!("{ports},1234"));
    machine.well(&["agent", "--config", &machine.agent_file(&instance, ""), "--cleanup"]);
    assert_eq!(machine.get("ipv4/conf/eth0/rp_filter"), "2");
    assert_eq!(machine.get("ipv4/conf/wire/forwarding"), "0");
    assert_eq!(machine.get("ipv4/ip_local_reserved_ports"), "1234,8472,32768-32800");
    assert_eq!(machine.get("ipv4/ip_forward"), "0");
    assert_eq!(machine.get("ipv4/conf/all/rp_filter"), "2");
}

#[test]
fn a_route_of_somebody_else_in_the_place_of_ours_is_back_after_the_cleanup() {
    let machine = Machine::new("routes");
    let instance = machine.name.clone();
    let cleanup = |()| machine.well(&["agent", "--config", &machine.agent_file(&instance, ""), "--cleanup"]);
    let ours = |v6: &str| machine.ip(&format!("{v6} route show table main proto 193"));
    let agent = machine.agent(&instance);
    machine.add_pod(&instance);
    let pod = ours("-4").lines().find(|line| !line.contains('/')).unwrap().split(' ').next().unwrap().to_owned();
    let [range, range6] = ["-4", "-6"].map(|v6| {
        let all = ours(v6);
        let range = all.lines().find(|line| line.starts_with("unreachable")).unwrap_or_else(|| panic!("{all}"));
        range.split_whitespace().nth(1).unwrap().to_owned()
    });
    agent.stop();
    cleanup(());

    // One with two routers, one with settings of its own, one to a single address; and beside ours, with another metric.
    let two = "nexthop via 192.0.2.7 weight 3 nexthop via 192.0.2.8";
    machine.ip(&format!("route add {range} proto static src 192.0.2.1 {two}"));
    machine.ip(&format!("-6 route add {range6} via 2001:db8:2::7 dev eth0 proto bird mtu 1400"));
    machine.ip(&format!("route add {pod} via 192.0.2.9 dev eth0"));
    machine.ip(&format!("route add {range} via 192.0.2.10 dev eth0 metric 50"));
    let before = machine.state();
    let agent = machine.agent(&instance);
    machine.add_pod(&instance);
    for route in [&range, &pod] {
        assert!(ours("-4").contains(route.as_str()), "{route} is not ours: {}", machine.ip("route"));
    }
    assert!(ours("-6").contains(&range6), "{}", machine.ip("-6 route"));
    agent.stop();
    cleanup(());
    machine.assert_state(&before, "cleaned");

    // What the administrator has put in the place of ours since stays; what he put there meanwhile comes back.
    let agent = machine.agent(&instance);
    eventually("it is ours", PATIENCE, || ours("-4").contains(&range));
    machine.ip(&format!("-6 route replace {range6} via 2001:db8:2::99 dev eth0"));
    eventually("it is ours again", PATIENCE, || ours("-6").contains(&range6));
    agent.stop();
    machine.ip(&format!("route replace {range} via 192.0.2.77 dev eth0"));
    cleanup(());
    let now = machine.ip(&format!("route show {range}"));
    assert!(now.contains("192.0.2.77") && now.contains("192.0.2.10") && !now.contains("192.0.2.7 "), "{now}");
    let now = machine.ip(&format!("-6 route show {range6}"));
    assert!(now.contains("2001:db8:2::99") && now.lines().count() == 1, "{now}");
    assert!(machine.state()["records"].is_empty(), "{:?}", machine.state()["records"]);
}

#[test]
fn a_first_start_that_fails_leaves_nothing_and_a_later_one_what_was_there() {
    let machine = Machine::new("first");
    let before = machine.state();
    let instance = machine.name.clone();
    let text = fs::read_to_string(machine.agent_file(&instance, "")).unwrap();
    let manifests = machine.path("manifests").display().to_string();
    let state = machine.path(&format!("var/cirri/state-{instance}")).display().to_string();
    let fails = |from: &str, to: &str| {
        let file = machine.path("wrong.yaml");
        assert!(text.contains(from), "{from} in {text}");
        fs::write(&file, text.replace(from, to)).unwrap();
        let output = machine.cirri(&["agent", "--config", &file.display().to_string()]);
        assert!(!output.status.success(), "with {to}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let missing = format!("{manifests}/missing");
    let wrong = [
        (manifests.as_str(), missing.as_str()),
        ("devices: [eth0]", "devices: [nowhere]"),
        ("devices: [eth0]", "ipv4: 192.0.2.99"),
        (state.as_str(), "/proc/cirri"),
        ("flows: 16384", "flows: 4294967295"),
    ];
    for (from, to) in wrong {
        let said = fails(from, to);
        machine.assert_state(&before, &format!("with {to}: {said}"));
    }

    // One that was there has somebody's state, of whichever boot.
    fs::create_dir_all(format!("{state}/endpoints")).unwrap();
    let with_state = machine.state();
    fails("devices: [eth0]", "devices: [nowhere]");
    let now = machine.state();
    assert!(now["files"].is_superset(&with_state["files"]) && now["records"].is_empty(), "{now:#?}");
    fs::remove_dir_all(machine.path("var")).unwrap();

    // The state directory of another agent, which is held.
    let agent = machine.agent(&instance);
    machine.add_pod(&instance);
    let running = machine.state();
    let said = fails(&format!("instance: {instance}"), "instance: another");
    assert!(said.contains("another agent uses"), "{said}");
    machine.assert_state(&running, "a second agent with the state directory of the first");
    agent.stop();
    let stopped = machine.state();
    fails("devices: [eth0]", "devices: [nowhere]");
    machine.assert_state(&stopped, "a later start that failed");
    machine.well(&["agent", "--config", &machine.agent_file(&instance, ""), "--cleanup"]);
    machine.assert_state(&before, "cleaned");
}

#[test]
fn a_second_agent_is_refused_and_takes_nothing_from_the_first() {
    let machine = Machine::new("second");
    let instance = machine.name.clone();
    let agent = machine.agent(&instance);
    machine.add_pod(&instance);
    let running = machine.state();
    // Direct routing has no overlay device: it would take away that of the first.
    let other = format!("{instance}-b");
    let file = machine.agent_file(&other, "routing: {mode: direct}\n");
    let output = machine.cirri(&["agent", "--config", &file]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(&instance), "{said}");
    machine.well(&["agent", "--config", &file, "--cleanup"]);
    machine.assert_state(&running, "a second agent that was refused");
    // The same instance with another state directory, too.
    let output = machine.cirri(&["agent", "--config", &machine.stolen_file(&instance), "--cleanup"]);
    assert!(!output.status.success(), "the pins of a running agent were removed by another's cleanup");
    machine.assert_state(&running, "a cleanup of the same instance from another state directory");
    agent.stop();
    machine.well(&["agent", "--config", &machine.agent_file(&instance, ""), "--cleanup"]);
}

#[test]
fn a_running_agent_keeps_its_instance_also_when_its_pins_were_removed() {
    let machine = Machine::new("claim");
    let instance = machine.name.clone();
    let agent = machine.agent(&instance);
    machine.add_pod(&instance);
    let running = machine.state();
    fs::remove_dir_all(Path::new("/sys/fs/bpf").join(&machine.name).join("pins").join(&instance)).unwrap();
    eventually("the pins are back", PATIENCE, || machine.state()["pins"] == running["pins"]);
    let file = machine.stolen_file(&instance);
    for arguments in [&["agent", "--config", &file, "--cleanup"][..], &["agent", "--config", &file]] {
        let output = machine.cirri(arguments);
        assert!(!output.status.success(), "{arguments:?} beside the running agent");
        machine.assert_state(&running, "another of the same instance was refused");
    }
    agent.stop();
    machine.well(&["agent", "--config", &machine.agent_file(&instance, ""), "--cleanup"]);
}

#[test]
fn the_machine_after_lb_down_is_as_before_and_another_user_of_the_same_settings_keeps_them() {
    let machine = Machine::new("lb");
    let before = machine.state();
    let write = |name: &str, more: &str| machine.lb_file(name, more);
    let start = |name: &str, file: &str| machine.lb(name, file);
    let (first, second) = (write("one", ""), write("two", ""));
    let one = start("one", &first);
    let reserved = machine.get("ipv4/ip_local_reserved_ports");
    let running = machine.state();
    let two = start("two", &second);
    two.stop();
    machine.well(&["lb", "down", "--config", &second]);
    machine.assert_state(&running, "the second of two has left");
    assert_eq!(machine.get("ipv4/ip_local_reserved_ports"), reserved);
    // Those that cannot start: its source is nobody's; one of its devices is not there.
    for (broken, more) in [("address: 192.0.2.99\n", "eth0"), ("", "eth0, eth9")] {
        let file = write("three", broken);
        let text = fs::read_to_string(&file).unwrap().replacen("[eth0]", &format!("[{more}]"), 1);
        fs::write(&file, text).unwrap();
        assert!(!machine.cirri(&["lb", "--config", &file]).status.success(), "{broken}");
        machine.assert_state(&running, "one that could not start");
    }
    one.stop();
    // What a process leaves that is killed while it writes.
    let left = [
        machine.path("lb/state-one/drained.json.4194303.tmp"),
        format!("/run/cirri-settings/{}.json.4194303.tmp", machine.name).into(),
    ];
    left.iter().for_each(|path| fs::write(path, "{").unwrap());
    machine.well(&["lb", "down", "--config", &first]);
    machine.assert_state(&before, "both are gone");
    assert!(!left.iter().any(|path| path.exists()), "of {left:?} something stays");
    assert!(!machine.path("lb").exists());
    // A first one.
    let file = write("three", "address: 192.0.2.99\n");
    assert!(!machine.cirri(&["lb", "--config", &file]).status.success());
    machine.assert_state(&before, "a first one that could not start");
    machine.well(&["lb", "down", "--config", &file]);
    machine.assert_state(&before, "nothing was there");
}

#[test]
fn a_file_that_an_lb_refuses_changes_nothing_of_the_machine() {
    let machine = Machine::new("refused");
    // A kind of device that has no native XDP.
    machine.ip("link add vx0 type vxlan id 1 dstport 4790");
    let file = machine.lb_file("one", "");
    let lb = machine.lb("one", &file);
    let mut running = machine.state();
    // A program that was loaded once stays for the next time.
    running.remove("pins");
    assert_ne!(machine.get("ipv4/ip_local_reserved_ports"), "8472,32768-32800");
    let text = fs::read_to_string(machine.lb_file("other", "snatPorts: 20000-20511\n")).unwrap();
    let text = text.replace("state-other", "state-one").replace("-other", "-one");
    let text = text.replace("acceleration: off", "acceleration: native").replace("[eth0]", "[eth0, vx0]");
    fs::write(&file, text).unwrap();
    eventually("the file is refused", PATIENCE, || {
        fs::read_to_string(machine.path("one.log")).unwrap().contains("the file is not in force")
    });
    machine.assert_state(&running, "a file that was refused");
    lb.stop();
    machine.well(&["lb", "down", "--config", &file]);
}

#[test]
fn an_agent_and_an_lb_on_one_machine_leave_it_as_it_was_whoever_comes_and_leaves_first() {
    let machine = Machine::new("both");
    let instance = machine.name.clone();
    let before = machine.state();
    let forwarding =
        |device: &str| ["ipv4", "ipv6"].map(|family| machine.get(&format!("{family}/conf/{device}/forwarding")));
    let (file, agent_file) = (machine.lb_file("one", ""), machine.agent_file(&instance, ""));
    for (agent_comes_first, agent_leaves_first) in [(true, true), (true, false), (false, true), (false, false)] {
        let what = format!("the agent comes first: {agent_comes_first}, leaves first: {agent_leaves_first}");
        for agent in [agent_comes_first, !agent_comes_first] {
            if agent { machine.agent(&instance) } else { machine.lb("one", &file) }.stop();
        }
        // One that comes while the agent has the machine.
        machine.ip("link add eth9 type veth peer name wire9");
        for agent in [agent_leaves_first, !agent_leaves_first] {
            if agent {
                machine.well(&["agent", "--config", &agent_file, "--cleanup"]);
                assert_eq!(forwarding("eth9"), ["0", "0"], "{what}");
            } else {
                machine.well(&["lb", "down", "--config", &file]);
            }
            let is_needed = agent == agent_leaves_first;
            assert_eq!(forwarding("eth0"), if is_needed { ["1", "1"] } else { ["0", "0"] }, "{what}");
        }
        machine.ip("link del eth9");
        machine.assert_state(&before, &what);
    }
}

#[test]
fn a_second_lb_backend_that_fails_or_leaves_takes_nothing_from_the_first() {
    let machine = Machine::new("bk");
    let before = machine.state();
    let (one, two) = (format!("{}-1", machine.name), format!("{}-2", machine.name));
    // An address that the administrator gave to lo himself.
    machine.ip("addr add 203.0.113.9/32 dev lo");
    let with_address = machine.state();
    machine.well(&[
        "lb",
        "backend",
        "--device",
        "eth0",
        "--vip",
        "203.0.113.10",
        "--vip",
        "203.0.113.9",
        "--instance",
        &one,
    ]);
    let running = machine.state();
    assert!(machine.ip("addr show dev lo").contains("203.0.113.10"));
    // It fails after it has begun: there is no BPF file system.
    let nowhere = machine.path("no-bpf").display().to_string();
    let failing = ["lb", "backend", "--device", "eth1", "--vip", "203.0.113.10", "--vip", "203.0.113.11"];
    let output = machine.cirri(&[&failing[..], &["--instance", &two, "--pin-root", &nowhere]].concat());
    assert!(!output.status.success());
    machine.assert_state(&running, "a second one that failed");
    // One of the same instance whose second device is not there.
    let output = machine.cirri(&["lb", "backend", "--device", "eth1", "--device", "eth9", "--instance", &one]);
    assert!(!output.status.success());
    machine.assert_state(&running, "the same instance, a device that is not there");
    // Another instance with the same address comes and goes.
    let vip = ["lb", "backend", "--device", "eth1", "--vip", "203.0.113.10", "--instance", &two];
    machine.well(&vip);
    machine.well(&[&vip[..], &["--remove"]].concat());
    machine.assert_state(&running, "the second has left");
    what_is_not_as_made_is_said(&machine, &one);
    machine.assert_state(&running, "made right again");
    let whole = ["lb", "backend", "--device", "eth0", "--vip", "203.0.113.10", "--vip", "203.0.113.9", "--remove"];
    machine.well(&[&whole[..], &["--instance", &one]].concat());
    machine.assert_state(&with_address, "both are gone");
    machine.ip("addr del 203.0.113.9/32 dev lo");
    machine.assert_state(&before, "as it began");
}

#[test]
fn what_a_setting_was_is_asked_while_nobody_else_can_put_it_back() {
    let machine = Machine::new("asked");
    // Who opens it waits for somebody who writes: the process stands still where it asks.
    let pipe = machine.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let call = ["lb", "backend", "--device", "eth0", "--vip", "203.0.113.10", "--instance", &machine.name];
    let script = format!(
        "mount --bind {} /proc/sys/net/ipv4/conf/eth0/arp_ignore && exec {} {}",
        pipe.display(),
        binary().unwrap().display(),
        call.join(" ")
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    let asking = Running(machine.net.namespace.run(|| command.spawn()).unwrap().unwrap());
    let tasks = format!("/proc/{}/task", asking.0.id());
    eventually("it asks", PATIENCE, || {
        let tasks = fs::read_dir(&tasks).unwrap().flatten();
        // Where the kernel lets who opens a pipe wait.
        tasks.flat_map(|task| fs::read_to_string(task.path().join("wchan"))).any(|it| it == "wait_for_partner")
    });
    let locked = Command::new("flock").args(["-n", "/run/cirri-settings", "true"]).status().unwrap();
    assert!(!locked.success(), "somebody who leaves could put it back now");
    drop(asking);
    machine.well(&[&call[..], &["--remove"]].concat());
}

#[test]
fn two_lb_backends_of_one_instance_at_once_wait_for_each_other() {
    let machine = Machine::new("atonce");
    let before = machine.state();
    let both = |more: &[&str]| {
        let call = |device: &str| {
            let one = ["lb", "backend", "--device", device, "--vip", "203.0.113.10", "--instance", &machine.name];
            machine.cirri(&[&one[..], more].concat())
        };
        let outputs = std::thread::scope(|scope| {
            let calls = ["eth0", "eth1"].map(|device| scope.spawn(move || call(device)));
            calls.map(|call| call.join().unwrap())
        });
        for output in outputs {
            assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
    };
    both(&[]);
    let check = machine.cirri(&["lb", "backend", "--check", "--instance", &machine.name]);
    assert_eq!(String::from_utf8_lossy(&check.stdout), "eth0: well\neth1: well\n");
    both(&["--remove"]);
    machine.assert_state(&before, "both are removed");
}

#[test]
fn an_lb_backend_is_removed_from_a_device_that_has_another_name_by_now() {
    let machine = Machine::new("renamed");
    let root = format!("/sys/fs/bpf/{}/pins", machine.name);
    let pins = Path::new(&root).join(&machine.name);
    let call = |more: &[&str]| {
        let all = [&["lb", "backend", "--pin-root", &root, "--instance", &machine.name], more].concat();
        machine.well(&all);
    };
    let attached = |device: &str| {
        let links: Value = serde_json::from_str(&machine.ip(&format!("-j link show {device}"))).unwrap();
        pins.join("links").join(format!("unwrap-{}", links[0]["ifindex"])).exists()
    };
    let vip = ["--vip", "203.0.113.10"];
    let rename = |from: &str, to: &str| machine.ip(&format!("link set {from} name {to}"));
    let before = machine.state();
    for vip in [&vip[..], &[]] {
        call(&[&["--device", "eth0", "--device", "eth1"], vip].concat());
        assert!(attached("eth0") && attached("eth1"));
        rename("eth0", "wan0");
        // The name is another's: nothing is taken away from that.
        rename("eth1", "eth0");
        call(&["--device", "eth0", "--remove"]);
        assert!(!attached("wan0") && attached("eth0"), "with {vip:?}");
        call(&["--device", "eth1", "--remove"]);
        assert!(!pins.exists(), "with {vip:?}");
        rename("eth0", "eth1");
        rename("wan0", "eth0");
        machine.assert_state(&before, "removed");
    }
}

/// `cirri lb backend --check` with each thing taken away or altered, and after the set-up was run again.
fn what_is_not_as_made_is_said(machine: &Machine, instance: &str) {
    let set_up = ["lb", "backend", "--device", "eth0", "--vip", "203.0.113.10", "--vip", "203.0.113.9"];
    let check = |more: &[&str]| {
        let output = machine.cirri(&[&["lb", "backend", "--check", "--instance", instance], more].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let well = (Some(0), "eth0: well\n".to_owned());
    let pins = Pinned(PathBuf::from("/sys/fs/bpf/cirri").join(instance));
    let number: Value = serde_json::from_str(&machine.ip("-j link show eth0")).unwrap();
    let cases: [(&str, &dyn Fn()); 5] = [
        ("203.0.113.10/32: gone; wanted: on lo", &|| drop(machine.ip("addr del 203.0.113.10/32 dev lo"))),
        ("unwrap: the program was taken off", &|| pins.detach(&format!("unwrap-{}", number[0]["ifindex"]))),
        ("unwrap: the program was taken off", &|| fs::remove_dir_all(&pins.0).unwrap()),
        ("arp_ignore: 0; wanted: 1", &|| machine.set("ipv4/conf/eth0/arp_ignore", "0")),
        ("others than the program knows", &|| drop(machine.ip("addr add 203.0.113.99/32 dev lo"))),
    ];
    for (said, damage) in cases {
        assert_eq!(check(&[]), well, "before {said}");
        damage();
        let (code, text) = check(&[]);
        assert!(code == Some(1) && text.contains(said), "{code:?}, not {said}: {text}");
        // Only one of them has added it.
        let _ = machine
            .net
            .namespace
            .run(|| Command::new("ip").args(["addr", "del", "203.0.113.99/32", "dev", "lo"]).output());
        machine.well(&[&set_up[..], &["--instance", instance]].concat());
    }
    assert_eq!(check(&["--device", "eth0"]), well);
    assert_eq!(check(&["--device", "eth1"]).0, Some(1), "nothing was set up there");
    assert_eq!(machine.cirri(&["lb", "backend", "--check", "--instance", "nobodys"]).status.code(), Some(1));
}

#[test]
fn an_agent_whose_pins_will_not_last_says_so_at_the_start_and_at_the_end() {
    let machine = Machine::new("mount");
    let instance = machine.name.clone();
    let file = machine.agent_file(&instance, "");
    let log = fs::File::create(machine.path("agent.log")).unwrap();
    // As `ip netns exec` does: a mount namespace with a /sys of its own, which has no BPF file system.
    let script = format!("mount -t sysfs sysfs /sys && exec {} agent --config {file}", binary().unwrap().display());
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).stdin(Stdio::null()).stderr(log.try_clone().unwrap()).stdout(log);
    let agent = Running(machine.net.namespace.run(|| command.spawn()).unwrap().unwrap());
    let socket = machine.path(&format!("var/cirri/state-{instance}/agent.sock"));
    eventually("the agent is ready", PATIENCE, || socket.exists());
    agent.stop();
    let said = fs::read_to_string(machine.path("agent.log")).unwrap();
    let warned =
        said.lines().any(|line| line.contains("WARN") && line.contains("mount namespace") && line.contains("pins"));
    assert!(warned, "no warning at the start: {said}");
    let last = said.lines().last().unwrap_or_default();
    assert!(last.contains("the packet path with it"), "the last line is not true: {last}");
    machine.well(&["agent", "--config", &file, "--cleanup"]);
}

#[test]
fn after_lab_down_nothing_of_the_lab_is_left_on_the_machine() {
    let state = |name: &str| {
        let printed = |argv: &[&str]| {
            let output = Command::new(argv[0]).args(&argv[1..]).output().unwrap();
            String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect::<BTreeSet<_>>()
        };
        let mine = |all: BTreeSet<String>| all.into_iter().filter(|line| line.contains(name)).collect::<BTreeSet<_>>();
        let records = printed(&["sh", "-c", "grep -l . /run/cirri-settings/*.json 2>/dev/null | xargs -r cat"]);
        let groups = printed(&["sh", "-c", "find /sys/fs/cgroup -maxdepth 4 -name 'cirri-lab-*'"]);
        let all =
            [printed(&["find", "/sys/fs/bpf"]), printed(&["ls", "/run/netns", "/run/cirri/lab"]), records, groups];
        all.into_iter().map(mine).collect::<Vec<_>>()
    };
    let lab = Lab::up("left", 1, &[]).unwrap();
    let name = lab.name().to_owned();
    let pid = fs::read_to_string(format!("/run/cirri/lab/{name}/nodes/node1/agent.pid")).unwrap();
    assert_eq!(pid.trim().parse::<i32>().ok(), lab.node("node1").unwrap().pid, "agent.pid is a number: {pid:?}");
    assert!(state(&name).iter().any(|lines| !lines.is_empty()));
    // Also after the agent was killed.
    lab.kill_agent("node1").unwrap();
    drop(lab);
    assert_eq!(state(&name), vec![BTreeSet::new(); 4]);
    let again = lab::run(["lab", "down", "--name", &name]).unwrap();
    assert!(String::from_utf8_lossy(&again.stdout).contains("there is no lab"));
}
