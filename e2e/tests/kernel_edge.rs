//! The XDP program on devices, across restarts, modes and neighbours. Needs root.

use std::{path::Path, process::Command};

use aya::programs::links::{FdLink, PinnedLink};
use cirri_e2e::kernel::{TestInstance, TestNamespace, names_in, veth};
use cirri_loader::{
    Datapath, EdgeMode, EdgeStatus, EdgeWanted, LoadError,
    trial::{Shot, edge_action},
};

/// What `ip` says about a device's XDP: the mode by its name there, and the program's number.
fn shown(place: &TestNamespace, device: &str) -> Option<(&'static str, u32)> {
    let path = format!("--net={}", place.namespace.path().display());
    let text = Command::new("nsenter").args([&path, "ip", "link", "show", device]).output().expect("ip runs").stdout;
    let text = String::from_utf8_lossy(&text).into_owned();
    let program = text.split("prog/xdp id ").nth(1)?.split_whitespace().next()?.parse().expect("a number");
    let generic = text.split_whitespace().any(|word| word.starts_with("xdpgeneric"));
    Some((if generic { "generic" } else { "native" }, program))
}

/// The kernel's number of a pinned link.
fn link_id(pin: &Path) -> u32 {
    FdLink::from(PinnedLink::from_pin(pin).expect("pinned")).info().expect("asked").id()
}

fn edge(datapath: &mut Datapath, device: &str, wanted: EdgeWanted) -> EdgeStatus {
    datapath.attach_edge(device, wanted).expect("attached")
}

fn in_mode(status: &EdgeStatus, mode: EdgeMode, reasons: &[&str]) {
    assert_eq!(status.mode, mode, "{status:?}");
    assert_eq!(status.reason.is_empty(), reasons.is_empty(), "{status:?}");
    assert!(reasons.iter().all(|reason| status.reason.contains(reason)), "{status:?}");
}

#[tokio::test]
async fn on_a_device_whose_driver_can_it_is_native_outlives_the_process_and_is_taken_over() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "eth0", "peer").await;
    let attach = || {
        let mut datapath = instance.load();
        datapath.attach_network("eth0").expect("attached");
        let status = edge(&mut datapath, "eth0", EdgeWanted::Native);
        in_mode(&status, EdgeMode::Native, &[]);
        assert_eq!(status.device, "eth0");
        datapath
    };
    drop(place.namespace.run(attach).expect("in the namespace"));
    let links = instance.dir().join("links");
    let pin = links.join(format!("edge-{ifindex}"));
    let names = names_in(&links);
    assert_eq!(names, ["edge", "from_network", "to_network"].map(|name| format!("{name}-{ifindex}")));
    let (mode, program) = shown(&place, "eth0").expect("it stayed");
    let id = link_id(&pin);
    assert_eq!(mode, "native");

    let again = place.namespace.run(attach).expect("in the namespace");
    let listed: Vec<_> = again.attachments().expect("listed").into_iter().map(|it| it.program).collect();
    assert_eq!(listed, ["edge", "from_network", "to_network"]);
    drop(again);
    let (mode, other) = shown(&place, "eth0").expect("it stayed");
    assert_eq!((mode, link_id(&pin)), ("native", id), "the same link ...");
    assert_eq!(program, other, "... with the same program, which did not change");
    assert_eq!(names_in(&links), names);
}

#[tokio::test]
async fn every_wish_is_heeded_and_off_takes_it_off() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    veth(&place.net(), "eth0", "peer").await;
    let place = &place;
    place
        .namespace
        .run(|| {
            let mut datapath = instance.load();
            let steps = [
                (EdgeWanted::Generic, Some("generic")),
                (EdgeWanted::Generic, Some("generic")),
                (EdgeWanted::Native, Some("native")),
                (EdgeWanted::Generic, Some("generic")),
                // Its other end may have no program, and would not take what is sent back.
                (EdgeWanted::BestEffort, None),
                (EdgeWanted::Native, Some("native")),
                (EdgeWanted::Off, None),
                (EdgeWanted::Off, None),
            ];
            for (wanted, expected) in steps {
                let status = edge(&mut datapath, "eth0", wanted);
                assert_eq!(status.mode.to_string(), expected.unwrap_or("tc"), "{wanted:?}");
                assert_eq!(shown(place, "eth0").map(|(mode, _)| mode), expected, "{wanted:?}");
            }
            assert_eq!(datapath.attachments().expect("listed"), []);
        })
        .expect("in the namespace");
}

#[tokio::test]
async fn where_the_driver_cannot_it_is_generic_and_the_status_says_why() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    place.net().create_vxlan("eth0", 4790, 1450).await.expect("made");
    let place = &place;
    place
        .namespace
        .run(|| {
            let mut datapath = instance.load();
            for _restart in 0..2 {
                let status = edge(&mut datapath, "eth0", EdgeWanted::BestEffort);
                in_mode(&status, EdgeMode::Generic, &["native: the driver cannot", "not supported"]);
            }
            assert_eq!(shown(place, "eth0").map(|(mode, _)| mode), Some("generic"));
            let error = datapath.attach_edge("eth0", EdgeWanted::Native).expect_err("must be refused").to_string();
            assert!(["edge", "eth0", "native", "cannot"].iter().all(|word| error.contains(word)), "{error}");
        })
        .expect("in the namespace");
}

#[tokio::test]
async fn where_another_program_is_it_is_left_to_tc_and_the_other_stays() {
    let (other, instance, place) = (TestInstance::new(), TestInstance::new(), TestNamespace::new());
    place.net().create_vxlan("eth0", 4790, 1450).await.expect("made");
    let place = &place;
    place
        .namespace
        .run(|| {
            edge(&mut other.load(), "eth0", EdgeWanted::Generic);
            let there = shown(place, "eth0");
            let mut datapath = instance.load();
            let status = edge(&mut datapath, "eth0", EdgeWanted::BestEffort);
            in_mode(&status, EdgeMode::Tc, &["native: ", "generic: another XDP program"]);
            let error = datapath.attach_edge("eth0", EdgeWanted::Generic).expect_err("must be refused").to_string();
            assert!(error.contains("another XDP program"), "{error}");
            edge(&mut datapath, "eth0", EdgeWanted::Off);
            assert_eq!(shown(place, "eth0"), there);
        })
        .expect("in the namespace");
}

#[tokio::test]
async fn it_goes_with_its_device_with_detaching_and_when_the_device_serves_something_else() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let net = place.net();
    let one = veth(&net, "eth0", "peer").await;
    let two = veth(&net, "eth1", "peer1").await;
    let three = veth(&net, "eth2", "peer2").await;
    let datapath = place.namespace.run(|| {
        let mut datapath = instance.load();
        for device in ["eth0", "eth1", "eth2"] {
            datapath.attach_network(device).expect("attached");
            edge(&mut datapath, device, EdgeWanted::Native);
        }
        datapath.detach(one).expect("detached");
        datapath.attach_workload("eth1").expect("attached in its place");
        assert!(!datapath.detach_edge(two).expect("nothing is there"));
        datapath
    });
    let mut datapath = datapath.expect("in the namespace");
    assert_eq!((shown(&place, "eth0"), shown(&place, "eth1")), (None, None));
    assert!(shown(&place, "eth2").is_some());
    net.delete_link("eth2").await.expect("deleted");
    let collected = datapath.collect_links().expect("collected");
    assert!(collected.iter().any(|it| it.program == "edge" && it.ifindex == three), "{collected:?}");
    let left: Vec<_> = datapath.attachments().expect("listed").into_iter().map(|it| (it.program, it.ifindex)).collect();
    assert_eq!(left, [("from_workload".to_owned(), two), ("to_workload".to_owned(), two)]);
}

#[tokio::test]
async fn a_new_device_with_the_number_of_an_old_one_gets_it_and_another_namespaces_device_is_left_alone() {
    let (instance, one, two) = (TestInstance::new(), TestNamespace::new(), TestNamespace::new());
    let number = veth(&one.net(), "eth0", "peer").await;
    assert_eq!(veth(&two.net(), "eth0", "peer").await, number);
    let attach = || instance.load().attach_edge("eth0", EdgeWanted::Native);
    one.namespace.run(attach).expect("in the first").expect("attached");
    let there = shown(&one, "eth0");
    let error = two.namespace.run(attach).expect("in the second").expect_err("must be refused");
    assert!(matches!(error, LoadError::ForeignLink { .. }), "{error}");
    assert_eq!((shown(&one, "eth0"), shown(&two, "eth0")), (there, None));

    one.net().delete_link("eth0").await.expect("deleted");
    two.namespace.run(attach).expect("in the second").expect("attached");
    assert!(shown(&two, "eth0").is_some());
}

#[test]
fn it_can_be_run_on_a_frame_without_a_device_and_passes_what_is_for_no_service() {
    let instance = TestInstance::new();
    let mut datapath = instance.load();
    let mut trial = datapath.trial().expect("the means");
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 76, 0, 0, 0, 0, 64, 17, 0x66, 0x9f, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0x30, 0x39, 0, 53, 0, 56, 0, 0]);
    frame.resize(90, 7);
    let lo = 1;
    let shot = Shot { packet: &frame, ifindex: lo, mark: 0, tunnel: None, flows: 0, first: 0, repeat: 100 };
    let landing = trial.run("edge", &shot).expect("it runs");
    assert_eq!((landing.action, landing.packet), (edge_action::PASS, frame.clone()));
    assert!(landing.each.as_nanos() > 0);
    let nowhere = Shot { ifindex: 9_999_999, ..shot };
    assert!(trial.run("edge", &nowhere).is_err(), "the device it comes in by must be there");
}
