//! Programs on devices as on kernels without tcx: filters of a clsact qdisc. Needs root.

use std::{fs, mem::ManuallyDrop, process::Command};

use aya::programs::TcAttachType;
use aya::programs::tc::{NlOptions, TcAttachOptions, TcHandle};
use cirri_e2e::kernel::{TestInstance, TestNamespace, veth};
use cirri_loader::{Attachment, Audit, Datapath, Hooking, Place};

fn instance() -> TestInstance {
    let mut instance = TestInstance::new();
    instance.options.hooking = Some(Hooking::Clsact);
    instance
}

/// What `tc` says in the namespace of the calling thread.
fn tc(arguments: &str) -> String {
    let output = Command::new("tc").args(arguments.split_whitespace()).output().expect("tc runs");
    assert!(output.status.success(), "tc {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// How many filters with this program are on a device, both directions.
fn filters(device: &str, program: &str) -> usize {
    let shown = ["ingress", "egress"].map(|direction| tc(&format!("filter show dev {device} {direction}")));
    shown.concat().matches(&format!(" {program} direct-action")).count()
}

fn has_qdisc(device: &str) -> bool {
    tc(&format!("qdisc show dev {device}")).contains("clsact")
}

/// Puts a program on what comes in by a device, by other means than the loader's.
fn put_filter(datapath: &mut Datapath, device: &str, priority: u16, handle: TcHandle) {
    let program = datapath.program_mut("from_network").expect("loaded");
    let options = TcAttachOptions::Netlink(NlOptions { priority, handle, classid: None });
    let link = program.attach_with_options(device, TcAttachType::Ingress, options).expect("attached");
    // Dropping it takes the filter off.
    let _kept = ManuallyDrop::new(program.take_link(link).expect("there"));
}

fn purge(instance: &TestInstance) {
    Datapath::purge(&instance.options.pin_root, &instance.options.instance).expect("removed");
}

#[tokio::test]
async fn without_tcx_filters_of_a_clsact_qdisc_do_the_same() {
    let (instance, place) = (instance(), TestNamespace::new());
    let ifindex = veth(&place.net(), "lxc1", "eth0").await;
    let filters = |direction: &str| {
        let path = format!("--net={}", place.namespace.path().display());
        let shown = Command::new("nsenter").args([&path, "tc", "filter", "show", "dev", "lxc1", direction]).output();
        String::from_utf8_lossy(&shown.expect("tc runs").stdout).into_owned()
    };
    for run in ["first", "second"] {
        place.namespace.run(|| instance.load().attach_workload("lxc1").expect("attached")).expect("in the namespace");
        for (direction, program) in [("ingress", "from_workload"), ("egress", "to_workload")] {
            let shown = filters(direction);
            assert_eq!(
                shown.matches(" bpf ").count(),
                2,
                "{run} {direction}: the protocol line and one filter: {shown}"
            );
            assert!(shown.contains(program) && shown.contains("direct-action"), "{run}: {shown}");
        }
    }
    place.namespace.run(|| instance.load().detach(ifindex).expect("detached")).expect("in the namespace");
    assert_eq!((filters("ingress"), filters("egress")), (String::new(), String::new()));
}

#[tokio::test]
async fn a_purge_takes_the_filters_off_and_the_qdiscs_that_were_made_for_them_and_no_others() {
    let (instance, others, place) = (instance(), instance(), TestNamespace::new());
    let first = veth(&place.net(), "eth0", "wire0").await;
    let second = veth(&place.net(), "eth1", "wire1").await;
    let tried = place.namespace.run(|| {
        tc("qdisc add dev eth1 clsact");
        put_filter(&mut others.load(), "eth1", 7, TcHandle::new(0, 1));
        let mut datapath = instance.load();
        datapath.attach_network("eth0").expect("attached");
        datapath.attach_network("eth1").expect("attached");
        let both = |ifindex| ["from_network", "to_network"].map(|it| Attachment { program: it.into(), ifindex });
        let mut all = [both(first), both(second)].concat();
        all.sort();
        let (root, name) = (&instance.options.pin_root, &instance.options.instance);
        assert_eq!(Datapath::attached(root, name).expect("listed"), all);
        drop(datapath);
        purge(&instance);
        assert_eq!(["eth0", "eth1"].map(|device| filters(device, "from_network")), [0, 1], "somebody else's stays");
        assert_eq!(["eth0", "eth1"].map(has_qdisc), [false, true]);
    });
    tried.expect("in the namespace");
}

#[tokio::test]
async fn a_filter_that_comes_while_the_qdiscs_owner_leaves_stays() {
    let (one, other, place) = (instance(), instance(), TestNamespace::new());
    let ifindex = veth(&place.net(), "eth0", "wire0").await;
    let inside = |work: &mut (dyn FnMut() + Send)| place.namespace.run(work).expect("in the namespace");
    let (mut leaves, mut comes) = (one.load(), other.load());
    for _ in 0..50 {
        inside(&mut || _ = leaves.attach_network("eth0").expect("attached"));
        std::thread::scope(|scope| {
            scope.spawn(|| inside(&mut || leaves.detach(ifindex).expect("detached")));
            inside(&mut || _ = comes.attach_network("eth0").expect("attached"));
        });
        inside(&mut || {
            assert_eq!(filters("eth0", "from_network") + filters("eth0", "to_network"), 2, "they were taken along");
            comes.detach(ifindex).expect("detached");
            if has_qdisc("eth0") {
                tc("qdisc del dev eth0 clsact");
            }
        });
    }
}

#[tokio::test]
async fn a_purge_finds_the_filters_of_an_instance_whose_pins_are_gone() {
    let (instance, other, place) = (instance(), instance(), TestNamespace::new());
    veth(&place.net(), "eth0", "wire0").await;
    let tried = place.namespace.run(|| {
        for it in [&instance, &other] {
            it.load().attach_network("eth0").expect("attached");
        }
        fs::remove_dir_all(instance.dir()).expect("removed");
        purge(&instance);
        assert_eq!(filters("eth0", "from_network"), 1, "the other's stays");
    });
    tried.expect("in the namespace");
}

#[tokio::test]
async fn of_two_devices_the_one_that_is_not_wanted_any_more_is_left_by_the_next_process() {
    let (instance, place) = (instance(), TestNamespace::new());
    let first = veth(&place.net(), "eth0", "wire0").await;
    let second = veth(&place.net(), "eth1", "wire1").await;
    let pod = veth(&place.net(), "lxc1", "wire2").await;
    let tried = place.namespace.run(|| {
        let mut datapath = instance.load();
        datapath.attach_network("eth0").expect("attached");
        datapath.attach_network("eth1").expect("attached");
        datapath.attach_workload("lxc1").expect("attached");
        drop(datapath);
        let mut datapath = instance.load();
        assert_eq!(datapath.leave_others(&[first].into()).expect("left"), [second].into());
        assert_eq!((filters("eth0", "from_network"), filters("eth1", "from_network")), (1, 0));
        assert_eq!(filters("lxc1", "from_workload"), 1, "it would be open");
        let (root, name) = (&instance.options.pin_root, &instance.options.instance);
        drop(datapath);
        assert_eq!(Datapath::workload_devices(root, name).expect("listed"), ["lxc1"], "{pod}");
    });
    tried.expect("in the namespace");
}

#[tokio::test]
async fn two_instances_serve_on_one_device_and_each_takes_off_its_own() {
    let (one, two, place) = (instance(), instance(), TestNamespace::new());
    let ifindex = veth(&place.net(), "eth0", "wire0").await;
    let tried = place.namespace.run(|| {
        let (mut first, mut second) = (one.load(), two.load());
        first.attach_network("eth0").expect("attached");
        second.attach_network("eth0").expect("attached beside it");
        first.attach_network("eth0").expect("attached again");
        for datapath in [&first, &second] {
            assert_eq!(datapath.misplaced(&[Place::Network(ifindex)]), []);
        }
        assert_eq!((filters("eth0", "from_network"), filters("eth0", "to_network")), (2, 2));
        first.detach(ifindex).expect("detached");
        assert_eq!(first.misplaced(&[Place::Network(ifindex)]).len(), 2);
        assert_eq!(second.misplaced(&[Place::Network(ifindex)]), []);
        drop(second);
        purge(&two);
        assert_eq!(filters("eth0", "from_network"), 0);
    });
    tried.expect("in the namespace");
}

#[tokio::test]
async fn a_filter_of_an_earlier_version_gives_way_and_another_instances_stays() {
    let (one, two, place) = (instance(), instance(), TestNamespace::new());
    veth(&place.net(), "eth0", "wire0").await;
    let tried = place.namespace.run(|| {
        let (mut first, mut second) = (one.load(), two.load());
        tc("qdisc add dev eth0 clsact");
        // Every instance had this handle.
        put_filter(&mut first, "eth0", 1, TcHandle::new(0xc144, 1));
        second.attach_network("eth0").expect("attached beside it");
        assert_eq!(filters("eth0", "from_network"), 2);
        first.attach_network("eth0").expect("attached in its place");
        let shown = tc("filter show dev eth0 ingress");
        assert_eq!((filters("eth0", "from_network"), shown.contains("0xc1440001")), (2, false), "{shown}");
    });
    tried.expect("in the namespace");
}

/// The handles of the filters on a device, first to run first.
fn order(device: &str, direction: &str) -> Vec<String> {
    let shown = tc(&format!("filter show dev {device} {direction}"));
    let handles = shown.lines().filter_map(|line| line.split(" handle ").nth(1)?.split(' ').next());
    handles.map(str::to_owned).collect()
}

/// Puts a filter without a program on a device, in a chain.
fn put_bytecode(device: &str, direction: &str, chain: u32) {
    let chain = chain.to_string();
    let place = ["filter", "add", "dev", device, direction, "chain", &chain, "prio", "1", "protocol", "all"];
    // It returns 0: nothing matches.
    let filter = ["bpf", "bytecode", "1,6 0 0 0", "classid", "1:1"];
    assert!(Command::new("tc").args(place).args(filter).status().expect("tc runs").success());
}

#[tokio::test]
async fn a_filter_of_somebody_else_before_ours_is_told_and_ours_is_made_the_first_again() {
    let (instance, other, place) = (instance(), TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "lxc1", "eth0").await;
    let places = [Place::Workload(ifindex)];
    let tried = place.namespace.run(|| {
        let (mut datapath, mut stranger) = (instance.load(), other.load());
        tc("qdisc add dev lxc1 clsact");
        // Those of a chain that no filter leads to do not run.
        put_bytecode("lxc1", "egress", 5);
        datapath.attach_workload("lxc1").expect("attached");
        assert_eq!(datapath.misplaced(&places), []);
        put_bytecode("lxc1", "egress", 0);
        let found = datapath.misplaced(&places);
        assert!(matches!(&found[..], [it] if it.found.to_string() == "a filter of somebody else runs before it"));
        datapath.attach_workload("lxc1").expect("attached again");
        assert_eq!(datapath.misplaced(&places), []);

        let [ours] = &order("lxc1", "ingress")[..] else { panic!("one filter") };
        // Of one priority the newest is the first.
        put_filter(&mut stranger, "lxc1", 1, TcHandle::new(0, 1));
        assert_eq!(order("lxc1", "ingress"), ["0x1", ours]);

        let found = datapath.audit(&places).expect("looked").misplaced;
        let [misplaced] = &found[..] else { panic!("{found:?}") };
        assert_eq!(misplaced.program, "from_workload");
        let said = misplaced.found.to_string();
        assert!(said.contains("(from_network) of somebody else runs before it"), "{said}");
        let (root, name) = (&instance.options.pin_root, &instance.options.instance);
        let told = Datapath::instead_of(root, name, places[0]).expect("looked").expect("told to whoever asks, too");
        assert_eq!(told, misplaced.found);

        for _ in 0..2 {
            datapath.attach_workload("lxc1").expect("attached again");
            let [first, second] = &order("lxc1", "ingress")[..] else { panic!("two filters") };
            assert!(first != ours && second == "0x1", "{first} {second}");
            assert_eq!(datapath.audit(&places).expect("looked"), Audit::default());
        }
        // It is as good a filter as the first one was.
        drop(datapath);
        purge(&instance);
        assert_eq!(order("lxc1", "ingress"), ["0x1"]);
    });
    tried.expect("in the namespace");
}

#[tokio::test]
async fn another_instances_filter_before_ours_is_a_stranger_on_a_workloads_device_only() {
    let (one, two, place) = (instance(), instance(), TestNamespace::new());
    let network = veth(&place.net(), "eth0", "wire0").await;
    let workload = veth(&place.net(), "lxc1", "wire1").await;
    let tried = place.namespace.run(|| {
        let (mut first, mut second) = (one.load(), two.load());
        first.attach_network("eth0").expect("attached");
        second.attach_network("eth0").expect("attached before it");
        let there = order("eth0", "ingress");
        assert_eq!(first.misplaced(&[Place::Network(network)]), []);
        first.attach_network("eth0").expect("attached again");
        assert_eq!(order("eth0", "ingress"), there, "two instances do not fight for the place");
        first.attach_workload("lxc1").expect("attached");
        put_filter(&mut second, "lxc1", 1, TcHandle::new(0, 1));
        assert_eq!(first.misplaced(&[Place::Workload(workload)]).len(), 1);
    });
    tried.expect("in the namespace");
}

#[tokio::test]
async fn a_move_that_a_crash_cut_short_leaves_one_filter_after_the_next_start() {
    let (instance, other, place) = (instance(), TestInstance::new(), TestNamespace::new());
    veth(&place.net(), "lxc1", "eth0").await;
    let tried = place.namespace.run(|| {
        let (mut datapath, mut stranger) = (instance.load(), other.load());
        datapath.attach_workload("lxc1").expect("attached");
        let [ours] = &order("lxc1", "ingress")[..] else { panic!("one filter") };
        let number = u32::from_str_radix(ours.trim_start_matches("0x"), 16).expect("a handle");
        let aside = TcHandle::new((number >> 16) as u16, number as u16 + 1);
        for _ in ["behind nobody", "behind somebody else"] {
            put_filter(&mut datapath, "lxc1", 1, aside);
            put_filter(&mut stranger, "lxc1", 1, TcHandle::new(0, 1));
            assert_eq!(order("lxc1", "ingress").len(), 3);
            drop(datapath);
            datapath = instance.load();
            datapath.attach_workload("lxc1").expect("attached by the next start");
            let [first, second] = &order("lxc1", "ingress")[..] else { panic!("two filters") };
            assert!(first == ours && second == "0x1", "{first} {second}");
            tc("filter del dev lxc1 ingress prio 1 handle 0x1 bpf");
        }
    });
    tried.expect("in the namespace");
}

#[tokio::test]
async fn of_a_device_that_is_gone_nothing_is_remembered() {
    let (instance, place) = (instance(), TestNamespace::new());
    let net = place.net();
    let ifindex = veth(&net, "lxc1", "eth0").await;
    let made = instance.dir().join(format!("qdiscs/{ifindex}"));
    let tried = place.namespace.run(|| {
        let mut datapath = instance.load();
        datapath.attach_workload("lxc1").expect("attached");
        assert!(made.exists());
        datapath.collect_links().expect("collected");
        assert!(made.exists());
        assert!(Command::new("ip").args(["link", "del", "lxc1"]).status().expect("ip runs").success());
        datapath.collect_links().expect("collected");
        assert!(!made.exists());
    });
    tried.expect("in the namespace");
}
