//! Rules that a VM's frames would pass by.

use super::*;

/// Runs a command in the pod's namespace; `false` where this machine does not have the program or what it
/// wants of the kernel.
fn inside(netns: &Netns, command: &str) -> bool {
    let args = ["netns", "exec", &netns.pod].into_iter().chain(command.split_whitespace());
    let output = Command::new("ip").args(args).output().unwrap();
    if !output.status.success() {
        eprintln!("skipped: {command}: {}", String::from_utf8_lossy(&output.stderr));
    }
    output.status.success()
}

#[tokio::test]
async fn rules_that_a_guest_cannot_have_are_refused_by_name() {
    for (command, expected) in [
        (
            "iptables-legacy -A INPUT -j DROP",
            "rules of iptables-legacy (in table filter), which do not hold for a VM: its",
        ),
        ("iptables-legacy -t nat -A OUTPUT -j RETURN", "rules of iptables-legacy (in table nat), which"),
        ("iptables-legacy -P FORWARD DROP", "rules of iptables-legacy (in table filter), which"),
        ("ip6tables-legacy -A INPUT -j DROP", "rules of ip6tables-legacy (in table filter), which"),
        ("ip6tables-legacy -P INPUT DROP", "rules of ip6tables-legacy (in table filter), which"),
        (
            "ip xfrm policy add src 10.77.0.5 dst 10.77.0.1 dir out action block",
            "IPsec policies (ip xfrm policy), which do not hold for a VM: its",
        ),
        (
            "arptables-nft -A INPUT -j DROP",
            "nftables rules of the family arp (chain INPUT of table filter), which do not hold for a VM: its frames pass them by; \
             use a CNI plugin with rules of the families inet, ip or ip6, or a runtime class without VMs",
        ),
    ] {
        let Some(netns) = Netns::with_eth0() else { return };
        if !inside(&netns, command) {
            continue;
        }
        let error = Plan::read(&netns.path()).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("the pod's network namespace has {expected}")), "{error}");
        assert!(error.ends_with("or a runtime class without VMs"), "{error}");
        assert!(!netns.tc().contains("ingress") && !netns.links().contains("kua"), "{}", netns.links());
    }
}

/// Rules that programs set are the same in another namespace, by those programs' own account.
#[tokio::test]
async fn rules_are_made_again_elsewhere() {
    let (Some(netns), Some(other)) = (Netns::with_eth0(), Netns::with_eth0()) else { return };
    for command in [
        "iptables-nft -A INPUT -p tcp --dport 8080 -j DROP",
        "iptables-nft -P FORWARD DROP",
        "iptables-nft -N CHECKED",
        "iptables-nft -A CHECKED -s 10.77.0.0/24 -j RETURN",
        "iptables-nft -A CHECKED -i lo -j ACCEPT",
        "iptables-nft -A OUTPUT -d 192.0.2.1 -j CHECKED",
        "iptables-nft -t nat -A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 15001",
        "iptables-nft -t nat -A OUTPUT -m owner --uid-owner 1337 -j RETURN",
        "iptables-nft -A INPUT -p tcp -m multiport --dports 15008,15020 -j ACCEPT",
        "ip6tables-nft -A INPUT -p tcp --dport 8080 -j DROP",
    ] {
        if !inside(&netns, command) {
            return;
        }
    }
    let plan = Plan::read(&netns.path()).await.unwrap();
    make(&other, plan.nftables.clone()).await.unwrap();
    let shown = |netns: &Netns| {
        let saved = |program| show("ip", &format!("netns exec {} {program}", netns.pod));
        let text = saved("iptables-nft-save") + &saved("ip6tables-nft-save");
        // Without the comments, which have the time.
        text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect::<String>()
    };
    assert!(shown(&netns).contains("--dport 8080 -j DROP"), "{}", shown(&netns));
    assert_eq!(shown(&other), shown(&netns));
    // And the messages are those that would be read there.
    assert_eq!(Plan::read(&other.path()).await.unwrap().nftables, plan.nftables);
    let network = plan.make(1).await.unwrap();
    assert!(!network.nftables.is_empty());
    remove(&network.record).await.unwrap();
}

async fn make(
    netns: &Netns,
    messages: Vec<NftablesMessage>,
) -> Result<(), kuasar_common::nftables::MakeError> {
    let made = |_| async move { Ok(kuasar_common::nftables::make(&messages)) };
    within(&netns.path(), made).await.unwrap()
}

#[tokio::test]
async fn a_kernel_that_does_not_take_a_rule_says_which() {
    let (Some(netns), Some(other)) = (Netns::with_eth0(), Netns::with_eth0()) else { return };
    if !inside(&netns, "iptables-nft -A INPUT -p tcp --dport 8080 -j DROP") {
        return;
    }
    let mut messages = Plan::read(&netns.path()).await.unwrap().nftables;
    // An expression that no kernel has.
    let last = messages.last_mut().unwrap();
    let at = last.body.windows(4).position(|bytes| bytes == b"meta").unwrap();
    last.body[at..at + 4].copy_from_slice(b"mete");
    let error = make(&other, messages).await.unwrap_err().to_string();
    assert!(
        error.starts_with("the kernel does not take a rule of chain INPUT of table ip filter (mete, cmp, "),
        "{error}"
    );
    // All or none.
    assert!(Plan::read(&other.path()).await.unwrap().nftables.is_empty());
}

#[tokio::test]
async fn sysctls_that_plugins_set_go_to_the_guest_and_others_do_not() {
    let Some(netns) = Netns::with_eth0() else { return };
    let sysctls = async || Plan::read(&netns.path()).await.unwrap().sysctls;
    assert_eq!(sysctls().await, BTreeMap::new(), "nobody has set any");
    let set = [
        ("net.core.somaxconn", "511"),
        ("net.ipv4.conf.eth0.rp_filter", "2"),
        ("net.ipv4.tcp_keepalive_time", "600"),
        ("net.ipv6.conf.all.accept_ra", "0"),
    ];
    for (name, value) in set {
        assert!(inside(&netns, &format!("sysctl -q -w {name}={value}")));
    }
    let expected = set.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(sysctls().await, BTreeMap::from(expected));
    let network = prepare(&netns.path(), 1).await.unwrap();
    assert_eq!(network.sysctls.len(), set.len());
    remove(&network.record).await.unwrap();
}

/// Looking at rules makes tables and chains, which do nothing.
#[tokio::test]
async fn tables_without_rules_are_in_nobodys_way() {
    let Some(netns) = Netns::with_eth0() else { return };
    for program in ["iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"] {
        for table in ["filter", "nat", "mangle", "raw"] {
            inside(&netns, &format!("{program} -t {table} -A OUTPUT -j ACCEPT"));
            inside(&netns, &format!("{program} -t {table} -F"));
        }
    }
    let network = prepare(&netns.path(), 1).await.unwrap();
    assert_eq!(network.nftables, []);
    remove(&network.record).await.unwrap();
}

/// A namespace without links has nobody who could pass by.
#[tokio::test]
async fn rules_of_the_loopback_alone_are_nothing() {
    let Some(netns) = Netns::new() else { return };
    if inside(&netns, "iptables-nft -A INPUT -j DROP") {
        assert!(prepare(&netns.path(), 1).await.unwrap().nics.is_empty());
    }
}
