//! Output of `#[derive(CmdLineParams)]`, seen from another crate.
#![allow(dead_code)]

use kuasar_common::param::{
    ToCmdLineParams, ToParams, bool_to_on_off, bool_to_socket_nowait, bool_to_socket_server, fds_to_vectors,
    vec_to_string,
};
use kuasar_derive::CmdLineParams;

#[test]
fn fields_print_as_key_and_value_under_the_struct_s_name() {
    #[derive(CmdLineParams)]
    struct Rtc {
        base: String,
        clock: &'static str,
        #[property(key = "driftfix")]
        drift_fix: String,
    }
    let rtc = Rtc { base: "utc".into(), clock: "host", drift_fix: "slew".into() };
    assert_eq!(rtc.to_cmdline_params("-"), ["-rtc", "base=utc,clock=host,driftfix=slew"]);
    assert_eq!(rtc.to_cmdline_params("--"), ["--rtc", "base=utc,clock=host,driftfix=slew"]);
}

#[test]
fn ignore_key_prints_the_value_and_an_option_only_when_there_is_one() {
    #[derive(CmdLineParams)]
    #[params("cpu")]
    struct Cpu {
        #[property(ignore_key)]
        model: String,
        #[property(ignore_key)]
        feat: Option<String>,
    }
    let with = Cpu { model: "host".into(), feat: Some("pmu=off".into()) };
    assert_eq!(with.to_cmdline_params("-"), ["-cpu", "host,pmu=off"]);
    assert_eq!(with.to_params()[0].get("feat"), Some("pmu=off"));
    let without = Cpu { model: "host".into(), feat: None };
    assert_eq!(without.to_cmdline_params("-"), ["-cpu", "host"]);
}

#[test]
fn a_predicate_decides_and_sees_the_struct() {
    #[derive(CmdLineParams)]
    struct Smp {
        cpus: u32,
        #[property(predicate = "self.cores > 0")]
        cores: u32,
    }
    assert_eq!(Smp { cpus: 2, cores: 0 }.to_cmdline_params("-"), ["-smp", "cpus=2"]);
    assert_eq!(Smp { cpus: 2, cores: 1 }.to_cmdline_params("-"), ["-smp", "cpus=2,cores=1"]);
}

#[test]
fn generators_and_ignored_fields() {
    struct Bus;
    #[derive(CmdLineParams)]
    #[params("device")]
    struct Bridge {
        #[property(ignore_key)]
        driver: String,
        id: String,
        #[property(generator = "bool_to_on_off")]
        shpc: bool,
        #[property(ignore)]
        bus: Bus,
    }
    let bridge = Bridge { driver: "pci-bridge".into(), id: "b0".into(), shpc: true, bus: Bus };
    assert_eq!(bridge.to_cmdline_params("-"), ["-device", "pci-bridge,id=b0,shpc=on"]);
}

#[test]
fn keys_are_kebab_case_unless_given() {
    #[derive(CmdLineParams)]
    struct Memory {
        size: u64,
        #[property(generator = "bool_to_on_off")]
        shared: bool,
        #[property(generator = "bool_to_on_off")]
        hugepages: bool,
        #[property(key = "hugepage_size")]
        hugepage_size: Option<String>,
        read_only: Option<bool>,
        r#type: Option<u8>,
    }
    let mut memory = Memory {
        size: 4_294_967_296,
        shared: false,
        hugepages: true,
        hugepage_size: Some("2M".into()),
        read_only: None,
        r#type: None,
    };
    assert_eq!(
        memory.to_cmdline_params("--"),
        ["--memory", "size=4294967296,shared=off,hugepages=on,hugepage_size=2M"]
    );
    (memory.hugepage_size, memory.read_only, memory.r#type) = (None, Some(true), Some(1));
    assert!(memory.to_cmdline_params("--")[1].ends_with("hugepages=on,read-only=true,type=1"));
}

#[derive(CmdLineParams)]
struct VirtioMemPci {
    id: u8,
}

#[test]
fn a_struct_s_name_becomes_kebab_case() {
    assert_eq!(VirtioMemPci { id: 1 }.to_cmdline_params("-"), ["-virtio-mem-pci", "id=1"]);
}

#[derive(CmdLineParams, Default)]
#[params("netdev", "device")]
struct Tap {
    #[property(param = "netdev", ignore_key)]
    r#type: String,
    #[property(param = "device", ignore_key)]
    driver: String,
    #[property(param = "netdev")]
    #[property(param = "device", key = "netdev")]
    id: String,
    #[property(param = "netdev", generator = "bool_to_on_off")]
    vhost: bool,
    #[property(param = "netdev", generator = "vec_to_string")]
    vhostfds: Vec<i32>,
    #[property(param = "netdev", generator = "vec_to_string")]
    #[property(param = "device", key = "vectors", generator = "fds_to_vectors")]
    fds: Vec<i32>,
    #[property(param = "device", key = "mac")]
    mac_address: String,
    #[property(param = "device", key = "mq", generator = "bool_to_on_off")]
    multi_queue: bool,
    #[property(ignore)]
    index: u32,
    #[property(param = "netdev", ignore)]
    nothing: Vec<()>,
}

#[test]
fn a_field_may_appear_in_several_params() {
    let tap = Tap {
        r#type: "tap".into(),
        driver: "virtio-net-pci".into(),
        id: "net1".into(),
        vhost: true,
        vhostfds: vec![1, 2, 3],
        fds: vec![4, 5, 6],
        mac_address: "02:00:00:00:00:01".into(),
        multi_queue: true,
        ..Tap::default()
    };
    assert_eq!(
        tap.to_cmdline_params("-"),
        [
            "-netdev",
            "tap,id=net1,vhost=on,vhostfds=1:2:3,fds=4:5:6",
            "-device",
            "virtio-net-pci,netdev=net1,vectors=8,mac=02:00:00:00:00:01,mq=on",
        ]
    );
}

#[test]
fn params_print_in_the_order_of_their_declaration() {
    #[derive(CmdLineParams)]
    #[params("z", "b", "y", "a", "x", "c")]
    struct Many {
        #[property(param = "a")]
        #[property(param = "b")]
        #[property(param = "c")]
        #[property(param = "x")]
        #[property(param = "y")]
        #[property(param = "z")]
        f: u8,
    }
    let names: Vec<_> = Many { f: 0 }.to_params().into_iter().map(|p| p.name).collect();
    assert_eq!(names, ["z", "b", "y", "a", "x", "c"]);
}

#[test]
fn an_option_with_a_predicate_never_panics() {
    #[derive(CmdLineParams)]
    struct Net {
        #[property(predicate = "self.on")]
        mtu: Option<u32>,
        #[property(predicate = "true", generator = "bool_to_on_off")]
        mq: Option<bool>,
        on: bool,
    }
    let print = |mtu, mq, on| Net { mtu, mq, on }.to_cmdline_params("-")[1].clone();
    assert_eq!(print(None, None, true), "on=true");
    assert_eq!(print(Some(9000), Some(false), true), "mtu=9000,mq=off,on=true");
    assert_eq!(print(Some(9000), None, false), "on=false");
}

#[test]
fn a_socket_s_bare_words_leave_no_comma_when_they_are_off() {
    #[derive(CmdLineParams)]
    #[params("chardev")]
    struct Socket {
        #[property(ignore_key)]
        backend: &'static str,
        #[property(ignore_key, generator = "bool_to_socket_server")]
        server: bool,
        #[property(ignore_key, generator = "bool_to_socket_nowait")]
        nowait: bool,
        id: &'static str,
    }
    let print = |server, nowait| Socket { backend: "socket", server, nowait, id: "c" }.to_cmdline_params("-");
    assert_eq!(print(true, true), ["-chardev", "socket,server,nowait,id=c"]);
    assert_eq!(print(false, false), ["-chardev", "socket,id=c"]);
}

#[test]
fn a_param_with_nothing_to_say_is_left_out() {
    #[derive(CmdLineParams)]
    struct Incoming {
        uri: Option<String>,
    }
    assert!(Incoming { uri: None }.to_cmdline_params("-").is_empty());
}

mod generators {
    pub(crate) fn hexadecimal(value: &u16) -> String {
        format!("{value:#06x}")
    }

    pub(crate) fn bracketed(values: &[i32]) -> String {
        format!("[{}]", values.iter().map(i32::to_string).collect::<Vec<_>>().join(","))
    }

    pub(crate) fn name(on: &bool) -> &'static str {
        if *on { "yes" } else { "no" }
    }
}

#[test]
fn generators_may_be_paths_and_return_what_turns_into_a_string() {
    #[derive(CmdLineParams)]
    struct Net {
        #[property(generator = "generators::hexadecimal")]
        vendor: u16,
        #[property(generator = "crate::generators::bracketed")]
        fd: Vec<i32>,
        #[property(generator = "generators::name")]
        up: Option<bool>,
    }
    let net = Net { vendor: 0x1af4, fd: vec![3, 4], up: Some(true) };
    assert_eq!(net.to_cmdline_params("--"), ["--net", "vendor=0x1af4,fd=[3,4],up=yes"]);
}

#[test]
fn generic_structs_need_no_bounds_written() {
    #[derive(CmdLineParams)]
    #[params("device")]
    struct Device<'a, T, U, const N: usize>
    where
        U: Copy,
    {
        id: T,
        parent: Option<&'a T>,
        #[property(ignore)]
        private: [U; N],
    }
    let device = Device { id: 7_u8, parent: Some(&3), private: [std::time::Duration::ZERO; 2] };
    assert_eq!(device.to_cmdline_params("-"), ["-device", "id=7,parent=3"]);
}

#[test]
fn types_substituted_by_a_macro_are_seen_through() {
    macro_rules! device {
        ($name:ident, $ty:ty) => {
            #[derive(CmdLineParams)]
            struct $name {
                id: $ty,
            }
        };
    }
    device!(Maybe, Option<u8>);
    assert_eq!(Maybe { id: Some(1) }.to_cmdline_params("-"), ["-maybe", "id=1"]);
    assert!(Maybe { id: None }.to_cmdline_params("-").is_empty());
}

/// Replacement that a crate uses which renames its dependency, or has none.
mod elsewhere {
    pub(crate) mod param {
        pub(crate) use kuasar_common::param::{Param, Property, ToParams};
    }
}

#[test]
fn the_crate_s_path_can_be_given() {
    #[derive(CmdLineParams)]
    #[params("a", crate = "crate::elsewhere")]
    struct Named {
        id: u8,
    }
    #[derive(CmdLineParams)]
    #[params(crate = "elsewhere")]
    struct Unnamed {
        id: u8,
    }
    assert_eq!(Named { id: 1 }.to_cmdline_params("-"), ["-a", "id=1"]);
    assert_eq!(Unnamed { id: 1 }.to_cmdline_params("-"), ["-unnamed", "id=1"]);
}

/// Generated code must not care what names mean where it lands.
mod hostile {
    #![allow(non_camel_case_types, clippy::upper_case_acronyms)]
    struct String;
    struct Vec;
    struct Option;
    struct ToString;

    #[derive(kuasar_derive::CmdLineParams)]
    pub(crate) struct Plain {
        pub(crate) id: std::option::Option<u8>,
    }
}

#[test]
fn generated_code_names_the_standard_library_by_its_full_path() {
    assert_eq!(hostile::Plain { id: Some(1) }.to_cmdline_params("-"), ["-plain", "id=1"]);
}

#[test]
fn a_predicate_may_be_any_expression() {
    #[derive(PartialEq, Clone, Copy)]
    struct Level {
        of: u8,
    }
    #[derive(CmdLineParams)]
    struct Log {
        #[property(predicate = "self.level != Level { of: 0 } && { let limit = 9; self.level.of < limit }")]
        file: &'static str,
        #[property(ignore)]
        level: Level,
    }
    let print = |of| Log { file: "f", level: Level { of } }.to_cmdline_params("-");
    assert_eq!(print(1), ["-log", "file=f"]);
    assert!(print(0).is_empty() && print(9).is_empty());
}
