use kuasar_derive::CmdLineParamSet;

#[derive(CmdLineParamSet)]
enum Accel {
    Kvm,
}

#[derive(CmdLineParamSet)]
struct Cpu(String);

fn main() {}
