//! Command-line parameters: what the derive macros of `kuasar-derive` generate code for.
//!
//! A [`Param`] is one option of a program with its [`Property`] list, as QEMU and Cloud Hypervisor take them:
//! `-device virtio-net-pci,netdev=net0,mq=on`. `#[derive(CmdLineParams)]` implements [`ToParams`],
//! `#[derive(CmdLineParamSet)]` implements [`ToCmdLineParams`] for a whole command line.

use std::fmt::Display;

/// One `key=value` of a parameter, or a bare value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Property {
    /// Name of the property.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Print the value only.
    pub ignore_key: bool,
}

impl Property {
    /// A property that prints as `key=value`, or as `value` when `ignore_key` is set.
    pub fn new(key: impl Into<String>, value: impl Into<String>, ignore_key: bool) -> Self {
        Self { key: key.into(), value: value.into(), ignore_key }
    }

    /// Formats the property for the command line. None for a bare value that is empty: it would leave two
    /// commas side by side, which QEMU reads as one comma within the value before.
    fn to_argument(&self) -> Option<String> {
        match (self.ignore_key, self.value.as_str()) {
            (true, "") => None,
            (true, value) => Some(value.to_owned()),
            (false, value) => Some(format!("{}={value}", self.key)),
        }
    }
}

/// One option of a command line with its properties, in the order in which they are printed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Param {
    /// Name of the option, without hyphens.
    pub name: String,
    /// Its properties.
    pub properties: Vec<Property>,
}

impl Param {
    /// An option with its properties.
    pub fn new(name: impl Into<String>, properties: Vec<Property>) -> Self {
        Self { name: name.into(), properties }
    }

    /// Value of the first property of that name, printed with its key or not.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.properties.iter().find(|p| p.key == key).map(|p| p.value.as_str())
    }

    /// The two arguments it prints as, name first; none when it has nothing to say, since a program reads an
    /// empty argument as a mistake.
    fn to_arguments(&self, hyphen: &str) -> Option<[String; 2]> {
        let properties: Vec<_> = self.properties.iter().filter_map(Property::to_argument).collect();
        (!properties.is_empty()).then(|| [format!("{hyphen}{}", self.name), properties.join(",")])
    }
}

/// Something that is one or several options of a command line.
pub trait ToParams {
    /// The options, in the order in which they are printed.
    fn to_params(&self) -> Vec<Param>;
}

/// Something that is a part of a command line.
pub trait ToCmdLineParams {
    /// The arguments. `hyphen` (`"-"` or `"--"`) precedes every option's name.
    fn to_cmdline_params(&self, hyphen: &str) -> Vec<String>;
}

impl<T: ToParams + ?Sized> ToCmdLineParams for T {
    fn to_cmdline_params(&self, hyphen: &str) -> Vec<String> {
        self.to_params().iter().filter_map(|param| param.to_arguments(hyphen)).flatten().collect()
    }
}

/// Generator: `on` or `off`.
#[must_use]
pub fn bool_to_on_off(value: &bool) -> String {
    if *value { "on" } else { "off" }.to_owned()
}

/// Generator for a socket's bare `server`; nothing when false.
#[must_use]
pub fn bool_to_socket_server(value: &bool) -> String {
    if *value { "server" } else { "" }.to_owned()
}

/// Generator for a socket's bare `nowait`; nothing when false.
#[must_use]
pub fn bool_to_socket_nowait(value: &bool) -> String {
    if *value { "nowait" } else { "" }.to_owned()
}

/// Generator for lists: the items with colons between them, as in QEMU's `fds=4:5:6`.
#[must_use]
pub fn vec_to_string<T: Display>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(":")
}

/// Generator for the interrupt vectors of a multi-queue network device: one for each of both directions of
/// every queue (a file descriptor each), one for configuration, one for control.
#[must_use]
pub fn fds_to_vectors<T>(fds: &[T]) -> String {
    (2 * fds.len() + 2).to_string()
}

/// Generator for text that may hold commas, such as paths: QEMU reads two commas as one within a value.
#[must_use]
pub fn escape_commas(value: &(impl Display + ?Sized)) -> String {
    value.to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Params(Vec<Param>);

    impl ToParams for Params {
        fn to_params(&self) -> Vec<Param> {
            self.0.clone()
        }
    }

    fn param(name: &str, properties: &[(&str, &str, bool)]) -> Param {
        Param::new(name, properties.iter().map(|(k, v, bare)| Property::new(*k, *v, *bare)).collect())
    }

    #[test]
    fn a_param_prints_as_name_and_joined_properties() {
        let params = Params(vec![
            param("device", &[("driver", "pci-bridge", true), ("id", "b0", false), ("addr", "", false)]),
            param("rtc", &[("base", "utc", false)]),
        ]);
        assert_eq!(params.to_cmdline_params("-"), ["-device", "pci-bridge,id=b0,addr=", "-rtc", "base=utc"]);
        assert_eq!(params.to_cmdline_params("--")[0], "--device");
    }

    #[test]
    fn nothing_prints_an_empty_argument_or_two_commas() {
        let params = Params(vec![
            param("empty", &[]),
            param("bare", &[("server", "", true)]),
            param("chardev", &[("type", "socket", true), ("server", "", true), ("id", "c0", false)]),
        ]);
        assert_eq!(params.to_cmdline_params("-"), ["-chardev", "socket,id=c0"]);
    }

    #[test]
    fn get_finds_the_first_property_of_a_name() {
        let param = param("netdev", &[("type", "tap", true), ("id", "n0", false), ("id", "n1", false)]);
        assert_eq!((param.get("type"), param.get("id"), param.get("none")), (Some("tap"), Some("n0"), None));
    }

    #[test]
    fn generators_print_what_the_programs_read() {
        assert_eq!((bool_to_on_off(&true), bool_to_on_off(&false)), ("on".into(), "off".into()));
        assert_eq!(
            (bool_to_socket_server(&true), bool_to_socket_server(&false)),
            ("server".into(), "".into())
        );
        assert_eq!(
            (bool_to_socket_nowait(&true), bool_to_socket_nowait(&false)),
            ("nowait".into(), "".into())
        );
        assert_eq!((vec_to_string(&[4, 5, 6]), vec_to_string::<i32>(&[])), ("4:5:6".into(), "".into()));
        assert_eq!((fds_to_vectors(&[1, 2, 3]), fds_to_vectors::<i32>(&[])), ("8".into(), "2".into()));
        assert_eq!(escape_commas("/a,b,,c"), "/a,,b,,,,c");
    }
}
