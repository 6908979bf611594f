use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
struct Cpu(String);

#[derive(CmdLineParams)]
struct Unit;

#[derive(CmdLineParams)]
union Either {
    a: u8,
    b: u16,
}

fn main() {}
