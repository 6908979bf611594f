//! Output of `#[derive(CmdLineParamSet)]`, seen from another crate.
#![allow(dead_code)]

use kuasar_common::param::ToCmdLineParams;
use kuasar_derive::{CmdLineParamSet, CmdLineParams};

#[test]
fn texts_print_always_and_options_only_when_there() {
    #[derive(CmdLineParamSet)]
    struct Kernel {
        #[param(key = "kernel")]
        path: String,
        initrd: Option<String>,
        #[param(key = "append")]
        params: Option<String>,
    }
    let mut kernel = Kernel { path: "/k".into(), initrd: None, params: Some("quiet".into()) };
    assert_eq!(kernel.to_cmdline_params("-"), ["-kernel", "/k", "-append", "quiet"]);
    (kernel.path, kernel.initrd, kernel.params) = (String::new(), Some("/i".into()), None);
    assert_eq!(kernel.to_cmdline_params("-"), ["-kernel", "", "-initrd", "/i"]);
}

#[test]
fn booleans_print_as_flags_when_true() {
    #[derive(CmdLineParamSet)]
    struct Qemu {
        no_user_config: bool,
        daemonize: bool,
        #[param(key = "S")]
        stopped: bool,
    }
    let qemu = Qemu { no_user_config: true, daemonize: false, stopped: true };
    assert_eq!(qemu.to_cmdline_params("-"), ["-no-user-config", "-S"]);
}

#[derive(CmdLineParams)]
struct Machine {
    #[property(ignore_key)]
    kind: String,
    accel: Option<String>,
}

#[derive(CmdLineParams)]
struct Global {
    driver: String,
    value: u8,
}

#[test]
fn parts_print_in_the_order_of_the_fields() {
    #[derive(CmdLineParamSet)]
    struct Top {
        name: String,
        machine: Machine,
        globals: Vec<Global>,
        incoming: Option<Global>,
        last: Option<Machine>,
    }
    let global = |driver: &str, value| Global { driver: driver.into(), value };
    let mut top = Top {
        name: "n".into(),
        machine: Machine { kind: "q35".into(), accel: Some("kvm".into()) },
        globals: vec![global("a", 1), global("b", 2)],
        incoming: None,
        last: Some(Machine { kind: "pc".into(), accel: None }),
    };
    let start = ["-name", "n", "-machine", "q35,accel=kvm"];
    let end = ["-machine", "pc"];
    let globals = ["-global", "driver=a,value=1", "-global", "driver=b,value=2"];
    assert_eq!(top.to_cmdline_params("-"), [&start[..], &globals, &end].concat());
    top.globals.clear();
    assert_eq!(top.to_cmdline_params("-"), [&start[..], &end].concat());
}

#[test]
fn virtiofsd_s_command_line() {
    #[derive(CmdLineParamSet)]
    struct VirtiofsdConfig {
        #[param(ignore)]
        path: String,
        log_level: String,
        cache: String,
        thread_pool_size: u32,
        socket_path: String,
        shared_dir: String,
        syslog: bool,
    }
    let config = VirtiofsdConfig {
        path: "/usr/local/bin/virtiofsd".into(),
        log_level: "info".into(),
        cache: "never".into(),
        thread_pool_size: 4,
        socket_path: "/s".into(),
        shared_dir: "/d".into(),
        syslog: true,
    };
    let expected =
        "--log-level info --cache never --thread-pool-size 4 --socket-path /s --shared-dir /d --syslog";
    assert_eq!(config.to_cmdline_params("--").join(" "), expected);
}

#[test]
fn lists_of_values_are_joined_by_commas_unless_empty() {
    #[derive(CmdLineParamSet)]
    struct Lists<'a> {
        features: Vec<String>,
        none: Vec<String>,
        fds: Vec<i32>,
        #[param(key = "x")]
        words: std::vec::Vec<&'a str>,
    }
    let lists =
        Lists { features: vec!["a".into(), "b".into()], none: vec![], fds: vec![3, 4], words: vec!["w"] };
    assert_eq!(lists.to_cmdline_params("--"), ["--features", "a,b", "--fds", "3,4", "--x", "w"]);
}

#[test]
fn every_kind_of_value_prints() {
    #[derive(CmdLineParamSet)]
    struct Values<'a> {
        text: std::string::String,
        borrowed: &'a str,
        small: i8,
        large: u128,
        size: usize,
        ratio: f64,
        level: Option<u8>,
        none: Option<i64>,
    }
    let values = Values {
        text: "t".into(),
        borrowed: "b",
        small: -1,
        large: u128::MAX,
        size: 0,
        ratio: 0.5,
        level: Some(3),
        none: None,
    };
    let expected = format!("-text t -borrowed b -small -1 -large {} -size 0 -ratio 0.5 -level 3", u128::MAX);
    assert_eq!(values.to_cmdline_params("-").join(" "), expected);
}

#[test]
fn generic_and_nested_sets_work_and_the_crate_s_path_can_be_given() {
    #[derive(CmdLineParamSet)]
    struct Inner {
        quiet: bool,
    }
    #[derive(CmdLineParamSet)]
    #[param(crate = "kuasar_common")]
    struct Outer<T, U> {
        machine: T,
        more: Vec<U>,
        inner: Inner,
    }
    let machine = |kind: &str| Machine { kind: kind.into(), accel: None };
    let outer = Outer { machine: machine("virt"), more: vec![machine("q35")], inner: Inner { quiet: true } };
    assert_eq!(outer.to_cmdline_params("-"), ["-machine", "virt", "-machine", "q35", "-quiet"]);
}

#[test]
fn an_empty_struct_prints_nothing() {
    #[derive(CmdLineParamSet)]
    struct Nothing {}
    assert!(Nothing {}.to_cmdline_params("-").is_empty());
}
