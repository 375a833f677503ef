//! The order of programs on a device: ours come first, whoever else is there. Needs root.

use std::fs;

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    tc::{SchedClassifierLink, TcAttachOptions},
};
use cirri_e2e::kernel::{TestInstance, TestNamespace, names_in, veth};
use cirri_loader::{Audit, Datapath, Place};

/// The numbers of the programs on a device, first to run first.
fn programs_on(device: &str, direction: TcAttachType) -> Vec<u32> {
    let (_, programs) = SchedClassifier::query_tcx(device, direction).expect("tcx answers");
    programs.iter().map(|program| program.id()).collect()
}

/// A program of somebody else before all others of a device, as long as the answer is kept.
fn before_all(stranger: &mut Datapath, device: &str, direction: TcAttachType) -> SchedClassifierLink {
    let program = stranger.program_mut("floor").expect("loaded");
    let first = TcAttachOptions::TcxOrder(LinkOrder::first());
    let link = program.attach_with_options(device, direction, first).expect("attached before all others");
    program.take_link(link).expect("ours to keep")
}

#[tokio::test]
async fn a_program_of_somebody_else_before_ours_is_told_and_ours_is_made_the_first_again() {
    let (instance, other, place) = (TestInstance::new(), TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "lxc1", "eth0").await;
    let tried = place.namespace.run(|| {
        let (mut datapath, mut stranger) = (instance.load(), other.load());
        datapath.attach_workload("lxc1").expect("attached");
        let [ours] = programs_on("lxc1", TcAttachType::Ingress)[..] else { panic!("one program") };
        let link = before_all(&mut stranger, "lxc1", TcAttachType::Ingress);
        let [foreign, _] = programs_on("lxc1", TcAttachType::Ingress)[..] else { panic!("two programs") };

        let found = datapath.audit(&[Place::Workload(ifindex)]).expect("looked").misplaced;
        let [misplaced] = &found[..] else { panic!("{found:?}") };
        assert_eq!(misplaced.program, "from_workload");
        let said = misplaced.found.to_string();
        assert!(said.contains(&foreign.to_string()) && said.contains("floor"), "{said}");

        datapath.attach_workload("lxc1").expect("attached again");
        assert_eq!(programs_on("lxc1", TcAttachType::Ingress), [ours, foreign], "the same program, and first");
        assert_eq!(datapath.misplaced(&[Place::Workload(ifindex)]), []);
        // What ends with this process is not the link that keeps it there.
        drop(datapath);
        assert_eq!(programs_on("lxc1", TcAttachType::Ingress), [ours, foreign]);
        drop(link);
        instance.load().attach_workload("lxc1").expect("attached by the next start");
        assert_eq!(programs_on("lxc1", TcAttachType::Ingress), [ours]);
    });
    tried.expect("in the namespace");
    let pins = names_in(&instance.dir().join("links"));
    assert_eq!(pins, [format!("from_workload-{ifindex}"), format!("to_workload-{ifindex}")]);
}

#[tokio::test]
async fn another_instances_program_before_ours_on_a_device_of_the_network_is_no_stranger() {
    let (one, two, place) = (TestInstance::new(), TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "eth0", "peer").await;
    let tried = place.namespace.run(|| {
        let (mut first, mut second) = (one.load(), two.load());
        first.attach_network("eth0").expect("attached");
        second.attach_network("eth0").expect("attached before it");
        let order = programs_on("eth0", TcAttachType::Ingress);
        assert_eq!(first.misplaced(&[Place::Network(ifindex)]), []);
        first.attach_network("eth0").expect("attached again");
        assert_eq!(programs_on("eth0", TcAttachType::Ingress), order, "two instances do not fight for the place");
        let _link = before_all(&mut second, "eth0", TcAttachType::Egress);
        let found = first.misplaced(&[Place::Network(ifindex)]);
        assert!(matches!(&found[..], [it] if it.program == "to_network"), "{found:?}");
    });
    tried.expect("in the namespace");
}

#[tokio::test]
async fn a_move_that_a_crash_cut_short_is_ended_by_the_next_start() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "lxc1", "eth0").await;
    let links = instance.dir().join("links");
    let pin = links.join(format!("from_workload-{ifindex}"));
    let tried = place.namespace.run(|| {
        instance.load().attach_workload("lxc1").expect("attached");
        let [ours] = programs_on("lxc1", TcAttachType::Ingress)[..] else { panic!("one program") };
        // The new link has our program already, the old one does not any more.
        fs::rename(&pin, links.join(format!("from_workload-{ifindex}-new"))).expect("renamed");
        let mut other = instance.load();
        let floor = other.program_mut("floor").expect("loaded");
        let id = floor.attach("lxc1", TcAttachType::Ingress).expect("attached");
        let link = floor.take_link(id).expect("ours to keep");
        aya::programs::links::FdLink::try_from(link).expect("a link").pin(&pin).expect("pinned");
        drop(other);

        let mut next = instance.load();
        next.attach_workload("lxc1").expect("attached by the next start");
        assert_eq!(programs_on("lxc1", TcAttachType::Ingress), [ours]);
        assert_eq!(next.audit(&[Place::Workload(ifindex)]).expect("looked"), Audit::default());
    });
    tried.expect("in the namespace");
    assert_eq!(names_in(&links), [format!("from_workload-{ifindex}"), format!("to_workload-{ifindex}")]);
}
