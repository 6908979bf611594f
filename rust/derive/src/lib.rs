//! Derive macros that turn structs into command lines.
//!
//! * [`macro@CmdLineParams`]: a struct is one option with properties, or several, such as QEMU's `-netdev`
//!   and `-device`;
//! * [`macro@CmdLineParamSet`]: a struct is a whole command line, or a part of one.
//!
//! The generated code names the traits of `kuasar_common::param` by their absolute path and works in every
//! crate that depends on `kuasar-common`.

mod common;
mod params;
mod set;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Implements `ToParams`, and by it `ToCmdLineParams`, for a struct with named fields.
///
/// Options are printed in the order in which `params` names them, properties in the order of the fields.
///
/// # Attributes of the struct
/// `#[params("a", "b", crate = "path")]`
/// * string literals: the names of the options. Without any, the struct is one option, named by the struct in
///   kebab-case.
/// * `crate`: what stands for `::kuasar_common` in the generated code.
///
/// # Attributes of a field
/// `#[property(...)]`; several of them print the field several times. A field without it prints as
/// `key=value`, which is an error when there are several options.
/// * `param = "a"`: the option it belongs to. Needed when there are several.
/// * `key = "k"`: name of the property, else the field's name in kebab-case.
/// * `predicate = "expression"`: print it only if true. The expression may use `self`.
/// * `generator = "path::to::function"`: makes the value of a reference to the field (to the content, for an
///   `Option`) and returns a `String` or what turns into one. Else `to_string()`.
/// * `ignore_key`: print the value without `key=`; an empty value is left out.
/// * `ignore`: print nothing.
///
/// A field of type `Option` is printed when it is `Some` and the predicate, if any, is true.
///
/// # Examples
/// ```
/// use kuasar_common::param::{ToCmdLineParams, bool_to_on_off, fds_to_vectors, vec_to_string};
/// use kuasar_derive::CmdLineParams;
///
/// #[derive(CmdLineParams)]
/// struct Smp {
///     cpus: u32,
///     #[property(predicate = "self.cores > 0")]
///     cores: u32,
///     #[property(key = "maxcpus")]
///     most: Option<u32>,
/// }
/// let smp = Smp { cpus: 2, cores: 0, most: Some(4) };
/// assert_eq!(smp.to_cmdline_params("-"), ["-smp", "cpus=2,maxcpus=4"]);
///
/// #[derive(CmdLineParams)]
/// #[params("netdev", "device")]
/// struct Tap {
///     #[property(param = "netdev", ignore_key)]
///     kind: String,
///     #[property(param = "device", ignore_key)]
///     driver: String,
///     #[property(param = "netdev")]
///     #[property(param = "device", key = "netdev")]
///     id: String,
///     #[property(param = "netdev", generator = "vec_to_string")]
///     #[property(param = "device", key = "vectors", generator = "fds_to_vectors")]
///     fds: Vec<i32>,
///     #[property(param = "device", key = "mq", generator = "bool_to_on_off")]
///     multi_queue: bool,
///     #[property(ignore)]
///     index: u32,
/// }
/// let tap = Tap {
///     kind: "tap".into(),
///     driver: "virtio-net-pci".into(),
///     id: "net1".into(),
///     fds: vec![4, 5],
///     multi_queue: true,
///     index: 1,
/// };
/// assert_eq!(
///     tap.to_cmdline_params("-"),
///     ["-netdev", "tap,id=net1,fds=4:5", "-device", "virtio-net-pci,netdev=net1,vectors=6,mq=on"],
/// );
/// # assert_eq!(tap.index, 1);
/// ```
///
/// A mistake is a compile error at the word that is wrong:
/// ```compile_fail
/// #[derive(kuasar_derive::CmdLineParams)]
/// struct Rtc {
///     #[property(kay = "base")] // unknown item
///     base: String,
/// }
/// ```
#[proc_macro_derive(CmdLineParams, attributes(params, property))]
pub fn cmd_line_params(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    params::derive(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Implements `ToCmdLineParams` for a struct with named fields: a whole command line, in the order of the
/// fields.
///
/// The printed form of a field depends on its type:
///
/// | type | prints |
/// |---|---|
/// | `bool` | `--key` if true |
/// | `String`, `&str`, integers, floats | `--key value`, always |
/// | `Option` of one of those but `bool` | `--key value` if `Some` |
/// | `Vec` of one of those but `bool` | `--key a,b` unless empty |
/// | `Option<T>`, `Vec<T>`, `T` of other types | what `T: ToCmdLineParams` prints; the field's name does not count |
///
/// # Attribute of the struct
/// `#[param(crate = "path")]`: what stands for `::kuasar_common` in the generated code.
///
/// # Attribute of a field
/// `#[param(...)]`
/// * `key = "k"`: name of the option, else the field's name in kebab-case.
/// * `ignore`: print nothing.
///
/// # Examples
/// ```
/// use kuasar_common::param::ToCmdLineParams;
/// use kuasar_derive::{CmdLineParamSet, CmdLineParams};
///
/// #[derive(CmdLineParams)]
/// struct Machine {
///     #[property(ignore_key)]
///     kind: String,
///     accel: Option<String>,
/// }
///
/// #[derive(CmdLineParamSet)]
/// struct Qemu {
///     name: String,
///     machine: Machine,
///     no_user_config: bool,
///     #[param(key = "S")]
///     stopped: bool,
///     initrd: Option<String>,
///     #[param(ignore)]
///     path: String,
/// }
/// let qemu = Qemu {
///     name: "pod".into(),
///     machine: Machine { kind: "q35".into(), accel: Some("kvm".into()) },
///     no_user_config: true,
///     stopped: false,
///     initrd: None,
///     path: "/usr/bin/qemu".into(),
/// };
/// assert_eq!(
///     qemu.to_cmdline_params("-"),
///     ["-name", "pod", "-machine", "q35,accel=kvm", "-no-user-config"],
/// );
/// # assert_eq!(qemu.path, "/usr/bin/qemu");
/// ```
#[proc_macro_derive(CmdLineParamSet, attributes(param))]
pub fn cmd_line_param_set(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    set::derive(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}
