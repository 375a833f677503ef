//! Maps, programs and links across restarts, crashes and upgrades. Needs root.

use std::{fs, process::Command};

use aya::programs::{SchedClassifier, TcAttachType};
use cirri_abi::{Addr, Endpoint, map};
use cirri_e2e::kernel::{TestInstance, TestNamespace, names_in, veth};
use cirri_loader::{Audit, Datapath, Hooking, LoadError, LoadOptions, Place, Use};

const POD: Addr = Addr::v4([10, 9, 8, 7]);

fn endpoint(id: u16) -> Endpoint {
    Endpoint { id, v4: POD, ..Endpoint::default() }
}

/// The numbers of the programs on a device, first to run first.
fn programs_on(device: &str, direction: TcAttachType) -> Vec<u32> {
    let (_, programs) = SchedClassifier::query_tcx(device, direction).expect("tcx answers");
    programs.iter().map(|program| program.id()).collect()
}

/// Makes the programs that are kept look like those of an earlier build.
fn as_of_another_object(instance: &TestInstance) {
    let dir = instance.dir().join("programs");
    for name in names_in(&dir) {
        let (program, _) = name.rsplit_once('-').expect("a program and a hash");
        fs::rename(dir.join(&name), dir.join(format!("{program}-0123456789abcdef"))).expect("renamed");
    }
}

/// The programs that are kept for the next start, without their hashes.
fn kept(instance: &TestInstance) -> Vec<String> {
    let names = names_in(&instance.dir().join("programs"));
    names.iter().map(|name| name.rsplit_once('-').expect("a program and a hash").0.to_owned()).collect()
}

#[test]
fn what_stands_in_the_maps_survives_the_process_that_loaded_them() {
    let instance = TestInstance::new();
    let first = instance.load();
    assert!(!first.resumed());
    first.tables().endpoints.put(&POD, &endpoint(7)).expect("written");
    first.tables().bump(9).expect("bumped");
    drop(first);

    let second = instance.load();
    assert!(second.resumed());
    assert_eq!(second.tables().endpoints.get(&POD).expect("read"), Some(endpoint(7)));
    assert_eq!(second.tables().epoch(9).expect("read"), 8);
}

#[test]
fn loading_warns_of_nothing_and_pins_every_map_of_the_abi() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    assert_eq!(datapath.warnings(), [] as [String; 0]);
    let mut expected: Vec<_> = map::ALL.iter().map(|map| map.name.to_owned()).collect();
    expected.sort();
    assert_eq!(names_in(&instance.maps()), expected);
}

#[test]
fn a_pinned_map_with_larger_values_is_not_used_and_the_whole_set_is_replaced() {
    let instance = TestInstance::new();
    let first = instance.load();
    first.tables().bump(9).expect("bumped");
    drop(first);
    let pin = instance.maps().join("ENDPOINTS");
    fs::remove_file(&pin).expect("unpinned");
    let other = aya::maps::HashMap::<_, [u8; 16], [u8; 256]>::create(16_384, 1).expect("another map");
    other.pin(&pin).expect("pinned in its place");

    let second = instance.load();
    assert!(!second.resumed());
    assert_eq!(second.tables().endpoints.get(&POD).expect("read"), None);
    assert_eq!(second.tables().epoch(9).expect("read"), 0, "epochs must not outlive the flows that rest on them");
    assert!(instance.load().resumed());
}

#[test]
fn a_pinned_map_that_is_no_storage_in_sockets_is_not_used_as_one() {
    let instance = TestInstance::new();
    drop(instance.load());
    let pin = instance.maps().join("SOCKETS");
    fs::remove_file(&pin).expect("unpinned");
    let other = aya::maps::HashMap::<_, u32, [u8; 168]>::create(16, 1).expect("another map");
    other.pin(&pin).expect("pinned in its place");
    assert!(!instance.load().resumed());
    assert!(instance.load().resumed());
}

#[test]
fn another_size_in_the_configuration_replaces_the_maps() {
    let mut instance = TestInstance::new();
    drop(instance.load());
    instance.options.sizes.insert("FLOWS4".into(), 2048);
    let resized = instance.load();
    assert!(!resized.resumed());
    assert_eq!(resized.tables().flows4.capacity(), 2048);
}

#[test]
fn what_a_crash_while_pinning_leaves_is_repaired() {
    let instance = TestInstance::new();
    drop(instance.load());
    fs::remove_file(instance.maps().join("EPOCHS")).expect("unpinned");
    let half = instance.dir().join(format!("{:016x}-new", cirri_abi::ABI_HASH));
    fs::create_dir(&half).expect("a half made set");

    assert!(!instance.load().resumed());
    assert!(!half.exists());
    assert!(instance.load().resumed());
}

#[test]
fn instance_names_that_the_file_system_reserves_are_refused() {
    for name in ["", "a.b", "../x", "a b"] {
        let options = LoadOptions { instance: name.into(), ..LoadOptions::default() };
        let error = Datapath::load(&options).err().expect("must be refused");
        assert!(error.to_string().contains("instance name"), "{error}");
    }
}

#[test]
fn a_pin_root_that_is_not_on_a_bpf_file_system_is_named_with_what_to_do() {
    let options = LoadOptions { pin_root: "/tmp/cirri-loader-pins".into(), ..LoadOptions::default() };
    let error = Datapath::load(&options).err().expect("must be refused").to_string();
    assert!(error.contains("/tmp/cirri-loader-pins") && error.contains("mount -t bpf"), "{error}");
}

#[tokio::test]
async fn attached_programs_outlive_the_process_and_an_upgrade_replaces_them_in_place() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "lxc1", "eth0").await;
    let attach = |instance: &TestInstance| {
        let mut datapath = instance.load();
        assert_eq!(datapath.attach_workload("lxc1").expect("attached"), ifindex);
        datapath
    };
    let place = &place;
    let before = place.namespace.run(|| {
        let mut datapath = attach(&instance);
        datapath.attach_workload("lxc1").expect("attaching twice is no error");
        drop(datapath);
        [TcAttachType::Ingress, TcAttachType::Egress].map(|direction| programs_on("lxc1", direction))
    });
    let before = before.expect("in the namespace");
    assert_eq!(before.each_ref().map(Vec::len), [1, 1]);
    let pins = names_in(&instance.dir().join("links"));
    assert_eq!(pins, [format!("from_workload-{ifindex}"), format!("to_workload-{ifindex}")]);

    let again = place.namespace.run(|| {
        drop(attach(&instance));
        [TcAttachType::Ingress, TcAttachType::Egress].map(|direction| programs_on("lxc1", direction))
    });
    assert_eq!(again.expect("in the namespace"), before, "a restart goes on with the same programs");

    as_of_another_object(&instance);
    let after = place.namespace.run(|| {
        drop(attach(&instance));
        [TcAttachType::Ingress, TcAttachType::Egress].map(|direction| programs_on("lxc1", direction))
    });
    let after = after.expect("in the namespace");
    assert_eq!(after.each_ref().map(Vec::len), [1, 1], "one program a direction, the old one gone");
    assert_ne!(before, after);
    assert_eq!(names_in(&instance.dir().join("links")), pins);
}

#[tokio::test]
async fn a_device_has_the_programs_of_what_it_serves_and_no_others() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    veth(&place.net(), "eth0", "peer").await;
    place
        .namespace
        .run(|| {
            let mut datapath = instance.load();
            let attached = |datapath: &Datapath| -> Vec<String> {
                datapath.attachments().expect("listed").into_iter().map(|it| it.program).collect()
            };
            let on = |direction| programs_on("eth0", direction).len();
            datapath.attach_network("eth0").expect("attached");
            assert_eq!(attached(&datapath), ["from_network", "to_network"]);
            assert_eq!((on(TcAttachType::Ingress), on(TcAttachType::Egress)), (1, 1));
            datapath.attach_unwrap("eth0").expect("attached in their place");
            assert_eq!(attached(&datapath), ["unwrap"]);
            assert_eq!((on(TcAttachType::Ingress), on(TcAttachType::Egress)), (1, 0));
        })
        .expect("in the namespace");
}

#[tokio::test]
async fn a_program_that_another_version_attached_and_this_one_does_not_goes() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "eth1", "eth0").await;
    place
        .namespace
        .run(|| {
            let mut datapath = instance.load();
            datapath.attach_overlay("eth1").expect("attached");
            datapath.attach_network("eth1").expect("attached in its place");
            let left = datapath.attachments().expect("listed");
            assert!(left.iter().all(|it| it.ifindex == ifindex && it.program.ends_with("_network")), "{left:?}");
            assert_eq!(programs_on("eth1", TcAttachType::Ingress).len(), 1);
        })
        .expect("in the namespace");
}

#[tokio::test]
async fn detaching_takes_both_programs_off_and_twice_is_no_error() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "lxc1", "eth0").await;
    place
        .namespace
        .run(|| {
            let mut datapath = instance.load();
            datapath.attach_workload("lxc1").expect("attached");
            assert_eq!(datapath.attachments().expect("listed").len(), 2);
            datapath.detach(ifindex).expect("detached");
            datapath.detach(ifindex).expect("detached again");
            assert_eq!(programs_on("lxc1", TcAttachType::Ingress), [] as [u32; 0]);
            assert_eq!(datapath.attachments().expect("listed"), []);
        })
        .expect("in the namespace");
}

#[tokio::test]
async fn a_device_that_the_audit_was_not_asked_about_yet_is_not_called_bare_afterwards() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "lxc1", "eth0").await;
    let looked = place.namespace.run(|| {
        let mut datapath = instance.load();
        datapath.attach_workload("lxc1").expect("attached");
        datapath.audit(&[]).expect("looked");
        let before = datapath.misplaced(&[Place::Workload(ifindex)]);
        for name in names_in(&instance.dir().join("links")) {
            fs::remove_file(instance.dir().join("links").join(name)).expect("unpinned");
        }
        let repinned = datapath.audit(&[Place::Workload(ifindex)]).expect("looked").repinned.len();
        datapath.detach(ifindex).expect("detached");
        (before, repinned, datapath.misplaced(&[Place::Workload(ifindex)]).len())
    });
    assert_eq!(looked.expect("in the namespace"), (Vec::new(), 2, 2), "there; put back; taken off");
}

#[tokio::test]
async fn links_whose_device_is_gone_are_collected_and_others_stay() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let net = place.net();
    let gone = veth(&net, "lxc1", "eth1").await;
    let stays = veth(&net, "lxc2", "eth2").await;
    let attached = place.namespace.run(|| {
        let mut datapath = instance.load();
        datapath.attach_workload("lxc1").expect("attached");
        datapath.attach_workload("lxc2").expect("attached");
        datapath
    });
    let mut datapath = attached.expect("in the namespace");
    assert!(net.delete_link("lxc1").await.expect("deleted"));

    let collected = datapath.collect_links().expect("collected");
    assert_eq!(collected.iter().map(|link| link.ifindex).collect::<Vec<_>>(), [gone, gone]);
    let left = datapath.attachments().expect("listed");
    assert_eq!(left.iter().map(|link| link.ifindex).collect::<Vec<_>>(), [stays, stays]);
}

#[tokio::test]
async fn a_stale_link_does_not_keep_a_new_device_with_its_number_from_being_attached() {
    let (instance, old, new) = (TestInstance::new(), TestNamespace::new(), TestNamespace::new());
    let number = veth(&old.net(), "lxc1", "eth1").await;
    old.namespace.run(|| instance.load().attach_workload("lxc1").expect("attached")).expect("in the old namespace");
    old.net().delete_link("lxc1").await.expect("deleted");

    assert_eq!(veth(&new.net(), "lxc1", "eth1").await, number);
    let attached = new.namespace.run(|| {
        instance.load().attach_workload("lxc1").expect("attached");
        programs_on("lxc1", TcAttachType::Ingress).len()
    });
    assert_eq!(attached.expect("in the new namespace"), 1);
}

#[tokio::test]
async fn two_agents_that_share_an_instance_name_are_told_and_the_first_keeps_its_programs() {
    let (instance, one, two) = (TestInstance::new(), TestNamespace::new(), TestNamespace::new());
    veth(&one.net(), "lxc1", "eth1").await;
    veth(&two.net(), "lxc1", "eth1").await;
    one.namespace.run(|| instance.load().attach_workload("lxc1").expect("attached")).expect("in the first");
    let error = two.namespace.run(|| instance.load().attach_workload("lxc1").expect_err("must be refused"));
    assert!(matches!(error.expect("in the second"), LoadError::ForeignLink { .. }));
    let kept = one.namespace.run(|| programs_on("lxc1", TcAttachType::Ingress).len());
    assert_eq!(kept.expect("in the first"), 1);
}

#[test]
fn maps_of_another_abi_stay_until_the_new_programs_are_attached() {
    let instance = TestInstance::new();
    drop(instance.load());
    let old = instance.dir().join("0123456789abcdef");
    fs::create_dir(&old).expect("an old set");
    let mut datapath = instance.load();
    assert!(old.exists());
    assert_eq!(datapath.retire().expect("retired").map_sets, ["0123456789abcdef"]);
    assert!(!old.exists());
    assert!(instance.load().resumed());
}

#[tokio::test]
async fn what_was_taken_off_a_device_is_told_with_tcx_and_without() {
    for hooking in [Hooking::Tcx, Hooking::Clsact] {
        let (mut instance, place) = (TestInstance::new(), TestNamespace::new());
        instance.options.hooking = Some(hooking);
        let ifindex = veth(&place.net(), "lxc1", "eth0").await;
        let tried = place.namespace.run(|| {
            let mut datapath = instance.load();
            datapath.attach_workload("lxc1").expect("attached");
            let is_off = |datapath: &Datapath| -> Vec<String> {
                datapath.misplaced(&[Place::Workload(ifindex)]).into_iter().map(|it| it.program).collect()
            };
            assert_eq!(is_off(&datapath), [""; 0], "{hooking:?}");
            match hooking {
                Hooking::Tcx => {
                    let pin = |program: &str| instance.dir().join(format!("links/{program}-{ifindex}"));
                    for program in ["from_workload", "to_workload"] {
                        let detach = ["link", "detach", "pinned"];
                        let detached = Command::new("bpftool").args(detach).arg(pin(program)).status();
                        assert!(detached.expect("bpftool runs").success());
                    }
                }
                Hooking::Clsact => {
                    let deleted = Command::new("tc").args(["qdisc", "del", "dev", "lxc1", "clsact"]).status();
                    assert!(deleted.expect("tc runs").success());
                }
            }
            assert_eq!(is_off(&datapath), ["from_workload", "to_workload"], "{hooking:?}");
            datapath.attach_workload("lxc1").expect("attached again");
            assert_eq!(is_off(&datapath), [""; 0], "{hooking:?}");
        });
        tried.expect("in the namespace");
    }
}

#[tokio::test]
async fn a_link_that_lost_its_pin_is_found_again_and_not_made_twice() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "lxc1", "eth0").await;
    let tried = place.namespace.run(|| {
        let mut datapath = instance.load();
        datapath.attach_workload("lxc1").expect("attached");
        let pin = instance.dir().join(format!("links/from_workload-{ifindex}"));
        fs::remove_file(&pin).expect("removed");
        datapath.attach_workload("lxc1").expect("attached again");
        assert!(pin.exists());
        assert_eq!(programs_on("lxc1", TcAttachType::Ingress).len(), 1);
    });
    tried.expect("in the namespace");
}

#[tokio::test]
async fn programs_that_were_taken_off_together_with_all_pins_are_attached_again() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let ifindex = veth(&place.net(), "lxc1", "eth0").await;
    let places = [Place::Workload(ifindex), Place::Sockets];
    let tried = place.namespace.run(|| {
        let mut datapath = instance.load();
        let cgroup = cirri_loader::cgroup_root().expect("mounted").join(instance.options.instance.as_str());
        fs::create_dir(&cgroup).expect("a control group");
        let attach = |datapath: &mut Datapath| {
            datapath.attach_workload("lxc1").expect("attached");
            datapath.attach_sockets(&cgroup).expect("attached");
        };
        attach(&mut datapath);
        datapath.audit(&places).expect("looked");
        let damage = || {
            for name in names_in(&instance.dir().join("links")) {
                let pin = instance.dir().join("links").join(name);
                let detached = Command::new("bpftool").args(["link", "detach", "pinned"]).arg(pin).status();
                assert!(detached.expect("bpftool runs").success());
            }
            fs::remove_dir_all(instance.dir()).expect("removed");
        };
        damage();
        // In this order, and in the other: something may be attached before it is looked for.
        attach(&mut datapath);
        damage();
        assert_eq!(datapath.audit(&places).expect("looked").misplaced.len(), 12);
        attach(&mut datapath);
        assert_eq!(datapath.misplaced(&places), []);
        damage();
        datapath.detach(ifindex).expect("nothing there is no error");
        let looked = datapath.audit(&[]);
        fs::remove_dir(&cgroup).expect("removed");
        looked.expect("looked");
    });
    tried.expect("in the namespace");
}

#[test]
fn an_instance_whose_directory_was_removed_is_claimed_again_with_the_new_one() {
    let instance = TestInstance::new();
    let (root, name) = (&instance.options.pin_root, &instance.options.instance);
    let claim = || Datapath::claim(root, name);
    let mut datapath = instance.load();
    datapath.keep_claim(claim().expect("nobody else's"));
    fs::remove_dir_all(instance.dir()).expect("removed");
    assert_eq!(datapath.audit(&[]).expect("looked").taken, None);
    assert!(matches!(claim(), Err(LoadError::Busy { .. })), "another could take the instance over");
    assert!(matches!(Datapath::purge(root, name), Err(LoadError::Busy { .. })), "another could take it apart");

    // Somebody else may be faster.
    fs::remove_dir_all(instance.dir()).expect("removed");
    let other = claim().expect("a new directory");
    assert!(datapath.audit(&[]).expect("looked").taken.is_some_and(|taken| taken.ends_with(name.as_str())));
    drop(other);
    assert_eq!(datapath.audit(&[]).expect("looked").taken, None);
    assert!(matches!(claim(), Err(LoadError::Busy { .. })));
}

#[tokio::test]
async fn a_device_that_is_not_there_is_named() {
    let (instance, place) = (TestInstance::new(), TestNamespace::new());
    let error =
        place.namespace.run(|| instance.load().attach_network("eth9").expect_err("must be refused").to_string());
    assert!(error.expect("in the namespace").contains("eth9"));
}

#[tokio::test]
async fn a_program_is_loaded_when_something_is_attached_to_it_and_not_before() {
    let (mut instance, place) = (TestInstance::new(), TestNamespace::new());
    veth(&place.net(), "eth0", "peer").await;
    drop(instance.load());
    assert!(!instance.dir().join("programs").exists(), "nothing is attached: nothing is loaded");

    place.namespace.run(|| instance.load().attach_network("eth0").expect("attached")).expect("in the namespace");
    assert_eq!(kept(&instance), ["from_network", "to_network"]);
    instance.options.uses = vec![Use::Unwrap];
    drop(instance.load());
    assert_eq!(kept(&instance), ["from_network", "to_network", "unwrap"], "what will be attached is loaded at once");
}

#[test]
fn programs_of_another_object_stay_until_those_of_this_one_are_attached() {
    let mut instance = TestInstance::new();
    instance.options.uses = vec![Use::Unwrap];
    drop(instance.load());
    as_of_another_object(&instance);
    let mut datapath = instance.load();
    assert_eq!(kept(&instance), ["unwrap", "unwrap"]);
    datapath.retire().expect("retired");
    assert_eq!(kept(&instance), ["unwrap"]);
    assert!(!names_in(&instance.dir().join("programs"))[0].ends_with("0123456789abcdef"));
}

#[test]
fn programs_on_maps_that_were_replaced_are_not_taken_over() {
    let mut instance = TestInstance::new();
    instance.options.uses = vec![Use::Unwrap, Use::Sockets];
    let number = |datapath: &mut Datapath| {
        datapath.programs().expect("listed").into_iter().find(|it| it.name == "connect4").expect("there").id
    };
    let first = number(&mut instance.load());
    assert_eq!(number(&mut instance.load()), first);
    instance.options.sizes.insert("SERVICES".into(), 64);
    let mut replaced = instance.load();
    assert!(!replaced.resumed());
    let second = number(&mut replaced);
    assert_ne!(second, first, "it works on the maps that are gone");
    drop(replaced);
    assert_eq!(number(&mut instance.load()), second);
}

#[test]
fn what_is_kept_as_a_program_and_is_none_is_replaced() {
    let mut instance = TestInstance::new();
    instance.options.uses = vec![Use::Unwrap];
    drop(instance.load());
    let dir = instance.dir().join("programs");
    let pin = dir.join(&names_in(&dir)[0]);
    fs::remove_file(&pin).expect("unpinned");
    let other = aya::maps::HashMap::<_, u32, u32>::create(1, 0).expect("a map");
    other.pin(&pin).expect("pinned in its place");
    instance.load().program_mut("unwrap").expect("loaded from the object");
    assert_eq!(kept(&instance), ["unwrap"]);
    aya::programs::SchedClassifier::from_pin(&pin).expect("a program again");
}

#[test]
fn another_map_in_a_pins_place_is_noticed_also_when_the_pin_was_right_before() {
    let instance = TestInstance::new();
    let mut datapath = instance.load();
    let pin = instance.maps().join("SERVICES");
    for _round in 0..2 {
        for _look in 0..2 {
            assert_eq!(datapath.audit(&[]).expect("looked"), Audit::default());
        }
        fs::remove_file(&pin).expect("unpinned");
        let strange = ["type", "hash", "key", "4", "value", "4", "entries", "1", "name", "strange"];
        let made = Command::new("bpftool").args(["map", "create"]).arg(&pin).args(strange).status();
        assert!(made.expect("bpftool runs").success());
        let repinned = datapath.audit(&[]).expect("looked").repinned;
        assert!(matches!(&*repinned, [name] if name.ends_with("/SERVICES")), "{repinned:?}");
    }
    fs::remove_file(&pin).expect("unpinned");
    assert_eq!(datapath.audit(&[]).expect("looked").repinned.len(), 1, "one that is gone");
    drop(datapath);
    assert!(instance.load().resumed(), "the next start finds the map itself");
}
